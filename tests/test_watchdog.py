"""The watchdog, on real ranks: one hangs, one is frozen, one is killed; each is named, all end."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from tests.ranks import start_ranks

TIMEOUT_SECONDS = 1.5


def _work(folder: str, fate: str) -> None:
    """Joins the others, takes three steps, then meets its fate on rank 1; rank 0 waits for it."""
    import torch
    import torch.distributed as dist

    from pocl_dist.distributed.process_group import join_process_group, lost_peers_named
    from pocl_dist.distributed.watchdog import Watchdog

    rank = join_process_group(60)

    def say(line: str) -> None:
        (Path(folder) / "said.txt").write_text(line)

    watchdog = Watchdog(Path(folder), "job", rank.index, rank.world_size, TIMEOUT_SECONDS, say)
    watchdog.start()
    with lost_peers_named(rank, watchdog.missing):
        for step in range(4):
            watchdog.beat("train", step)
            if step == 3 and fate == "each waits for the other":
                dist.recv(torch.zeros(1), src=1 - rank.index)
            if step == 3 and rank.index == 1:
                if fate == "sleep":
                    time.sleep(60)
                time.sleep(0.8)  # long enough for a sign of life from this step
                os.kill(os.getpid(), {"freeze": signal.SIGSTOP, "kill": signal.SIGKILL}[fate])
            dist.barrier()
            if step < 3:
                time.sleep(0.4)


def _run(tmp_path: Path, fate: str) -> tuple[str, list[int | None], list]:
    started = time.monotonic()
    processes, results = start_ranks(_work, 2, str(tmp_path), fate)
    for process in processes:
        process.join(30)
    codes = [process.exitcode for process in processes]
    assert time.monotonic() - started < 25
    errors = [results.get()[2] for code in codes if code == 0]
    said = tmp_path / "said.txt"
    return said.read_text() if said.exists() else "", codes, errors


def test_a_rank_that_hangs_is_named_with_its_line_and_all_ranks_end_with_71(tmp_path: Path) -> None:
    said, codes, _ = _run(tmp_path, "sleep")
    assert codes == [71, 71]
    assert said.startswith("rank 1 (process ")
    assert "hangs at test_watchdog.py:" in said and " _work after step 3, train" in said
    assert "rank 0" not in said
    assert "time.sleep(60)" in Path(__file__).read_text().splitlines()[_line_of(said) - 1]
    for index in (0, 1):
        assert "test_watchdog.py" in (tmp_path / f"stacks-rank-{index:05d}.txt").read_text()


def _line_of(said: str) -> int:
    return int(said.partition("test_watchdog.py:")[2].split()[0])


def test_a_frozen_rank_is_named_and_ended(tmp_path: Path) -> None:
    said, codes, _ = _run(tmp_path, "freeze")
    assert codes == [71, -signal.SIGKILL]
    assert said.startswith("rank 1 (process ")
    assert "does not answer, last seen after step 3, train" in said


def test_a_killed_rank_is_named_at_once(tmp_path: Path) -> None:
    said, codes, errors = _run(tmp_path, "kill")
    assert codes == [0, -signal.SIGKILL]
    name, message, _ = errors[0]
    assert name == "WorkerError"
    assert "rank 0 lost another rank: rank 1 (process " in message
    assert "is gone, last seen after step" in message
    assert said == ""


def test_when_all_ranks_wait_each_is_told_with_its_line(tmp_path: Path) -> None:
    said, codes, _ = _run(tmp_path, "each waits for the other")
    assert codes == [71, 71]
    assert said.startswith("all ranks wait in a collective: rank 0 at ")
    assert "; rank 1 at " in said


def test_a_phase_without_bound_raises_no_alarm_and_still_gives_signs_of_life(
    tmp_path: Path,
) -> None:
    from pocl_dist.distributed.watchdog import Watchdog

    said: list[str] = []
    watchdog = Watchdog(tmp_path, "job", 0, 1, 0.2, said.append)
    watchdog.beat("loading", is_bounded=False)
    watchdog.start()
    time.sleep(0.6)
    watchdog.close()
    row = json.loads((tmp_path / "rank-00000.json").read_text())
    assert said == [] and row["phase"] == "loading" and row["count"] > 3
    assert not (tmp_path / "alarm.json").exists()


def test_signs_of_life_of_an_earlier_start_are_not_looked_at(tmp_path: Path) -> None:
    from pocl_dist.distributed.watchdog import Watchdog

    row = {"job": "before", "rank": 1, "host": "elsewhere", "pid": 1, "step": 9, "phase": "train"}
    (tmp_path / "rank-00001.json").write_text(json.dumps(row))
    (tmp_path / "alarm.json").write_text(json.dumps({"job": "before", "rank": 1}))
    said: list[str] = []
    watchdog = Watchdog(tmp_path, "now", 0, 2, 60.0, said.append)
    watchdog.start()
    ends = time.monotonic() + 5
    while not (tmp_path / "rank-00000.json").exists() and time.monotonic() < ends:
        time.sleep(0.01)
    assert watchdog.missing() == ""
    watchdog.close()
    assert said == [] and not (tmp_path / "alarm.json").exists()
