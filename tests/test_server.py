"""measure with a server: a real `transformers serve` on loopback, and one that misbehaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from pocl_dist.config import load_config
from pocl_dist.data.encoding import collate
from pocl_dist.difficulty import server as client
from pocl_dist.difficulty.server import Server, ServerPrompt, ask, check_reachable
from pocl_dist.difficulty.server_pool import ask_all
from pocl_dist.difficulty.work import make_batches, make_shards
from pocl_dist.errors import (
    ConfigError,
    MismatchError,
    StoppedError,
    UnavailableError,
)
from pocl_dist.files import read_json
from pocl_dist.free_port import free_port
from pocl_dist.models.greedy import answer_and_score
from pocl_dist.models.loading import load_model, load_tokenizer
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline.difficulty_files import read_records
from pocl_dist.pipeline.inputs import make_encoder, read_train
from pocl_dist.pipeline.measure import measure
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.preflight import check_inputs
from pocl_dist.pipeline.server_answers import find_server, server_answers
from tests.fixtures_models import make_run, write_varied_rows
from tests.fixtures_models import ray_of_module as ray_of_module
from tests.tiny import write_config

pytest.importorskip("fastapi", reason="`transformers serve` needs the dev extra")

Pair = tuple[Path, Path, Path]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} says: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant says: {% endif %}"
)


# ----------------------------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def served(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Returns a student with a chat template, and the URL of a server that has it."""
    folder = tmp_path_factory.mktemp("served")
    student = folder / "student"
    shutil.copytree(tiny_pair[1], student)
    (student / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    port = free_port()
    code = "from transformers.cli.transformers import main; main()"
    words = ["serve", str(student), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words, "--dtype", "float32"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        try:
            deadline = time.monotonic() + 90
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                except OSError:
                    assert process.poll() is None, (folder / "log.txt").read_text()
                    assert time.monotonic() < deadline, "no server in time"
                    time.sleep(0.2)
            yield student, f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(timeout=20)


def server_section(url: str, model: object, form: str = "text", **more: object) -> dict:
    return {
        "engine": "server",
        "server_url": url,
        "server_model": str(model),
        "server_prompt": form,
        "server_retries": 1,
        **more,
    }


@pytest.mark.parametrize(("form", "template"), [("text", "short"), ("messages", "chat")])
def test_a_real_server_gives_the_answers_of_the_local_engine(
    served: tuple[Path, str], tmp_path: Path, form: str, template: str
) -> None:
    student, url = served
    train = write_varied_rows(tmp_path / "train.jsonl", 12)
    config, run = make_run(
        tmp_path,
        student,
        train,
        None,
        measure=server_section(url, student, form, server_concurrency=3),
        data={"template": template},
    )
    source = ModelFolder(student, "student")
    tokenizer, model = load_tokenizer(source), load_model(source, torch.float32)
    rows = read_train(config)
    encoder = make_encoder(config, tokenizer)
    encoded = [encoder.encode(example) for example in rows.examples]
    batches = make_batches(encoded, {row.example_id: () for row in encoded}, 5)
    shards = {shard.name: shard for shard in make_shards(batches, 5)}
    answers = server_answers(config, run, shards, rows, find_server(config))
    for batch in batches:
        local = answer_and_score(model, tokenizer, batch.examples, collate(batch.examples, 0), 6)
        assert [answers[row.example_id] for row in batch.examples] == [row.answer for row in local]
    assert len(set(answers.values())) > 1


def test_what_a_real_server_refuses_is_told_by_key(
    served: tuple[Path, str], tmp_path: Path
) -> None:
    student, url = served
    train = write_varied_rows(tmp_path / "train.jsonl", 4)
    sections = {
        "measure.server_model 'other'": server_section(url, "other"),
        "measure.server_prompt": server_section(url, student, "token_ids"),
    }
    for number, (key, section) in enumerate(sections.items()):
        config, run = make_run(tmp_path / str(number), student, train, None, measure=section)
        with pytest.raises(ConfigError, match=key):
            measure(config, run)
        assert not list(run.difficulty.glob("shard-*"))


# ---------------------------------------------------------------------------- one that misbehaves


Reply = Callable[[str, dict, int], tuple[int, dict]]


@pytest.fixture
def scripted() -> Iterator[Callable[[Reply], tuple[str, list[tuple[dict, dict]]]]]:
    """Returns a function that starts a server from (path, body, number of request) -> reply."""
    started = []

    def start(reply: Reply) -> tuple[str, list[tuple[dict, dict]]]:
        seen: list[tuple[dict, dict]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append((body, dict(self.headers)))
                status, value = reply(self.path, body, len(seen))
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/v1/elsewhere")
                self.end_headers()
                self.wfile.write(json.dumps(value).encode())

            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{"data": []}')

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", seen

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def completion(text: str, num_tokens: int, **more: object) -> tuple[int, dict]:
    usage = {"prompt_tokens": num_tokens}
    return 200, {"choices": [{"text": text, **more}], "usage": usage}


PROMPT = ServerPrompt("row-7", [5, 6, 7], (5, 6, 7))


def make_server(url: str, retries: int = 3, api_key: str | None = None) -> Server:
    return Server(url, "student", 5.0, retries, api_key)


def test_token_ids_go_out_as_they_are_and_greedy(scripted) -> None:  # type: ignore[no-untyped-def]
    url, seen = scripted(lambda path, body, n: completion(" yes\n", 3, prompt_token_ids=[5, 6, 7]))
    assert ask(make_server(url), PROMPT, 9) == "yes"
    assert seen[0][0] == {
        "model": "student",
        "prompt": [5, 6, 7],
        "max_tokens": 9,
        "temperature": 0.0,
    }
    assert "Authorization" not in seen[0][1]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again_and_a_dead_one_given_up(
    scripted, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.01)
    url, seen = scripted(
        lambda path, body, n: completion("yes", 3) if n == 3 else (status, {"error": "busy"})
    )
    assert ask(make_server(url), PROMPT, 9) == "yes" and len(seen) == 3
    with pytest.raises(UnavailableError, match=f"failed 2 times for row 'row-7'.*HTTP {status}"):
        ask(make_server(url, retries=1), PROMPT, 9)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (completion("yes", 4), r"row 'row-7'.*saw 4 prompt tokens, we have 3"),
        (
            completion("yes", 3, prompt_token_ids=[5, 9, 7]),
            r"row 'row-7'.*token 9 at position 1, we have 6",
        ),
        ((200, {"choices": [{"text": "yes"}]}), r"row 'row-7'.*does not count prompt tokens"),
    ],
)
def test_drift_is_refused_by_row_and_counts(scripted, reply, message: str) -> None:  # type: ignore[no-untyped-def]
    url, seen = scripted(lambda path, body, n: reply)
    with pytest.raises(MismatchError, match=message):
        ask(make_server(url), PROMPT, 9)
    assert len(seen) == 1


def test_the_key_is_sent_and_never_shown(scripted) -> None:  # type: ignore[no-untyped-def]
    url, seen = scripted(lambda path, body, n: (401, {"error": "no such key: sesame"}))
    server = make_server(url, api_key="sesame")
    with pytest.raises(ConfigError, match=r"measure\.server_key_variable") as caught:
        ask(server, PROMPT, 9)
    assert seen[0][1]["Authorization"] == "Bearer sesame"
    assert "sesame" not in str(caught.value) and "sesame" not in repr(server)


def test_a_redirect_is_not_followed(scripted) -> None:  # type: ignore[no-untyped-def]
    url, seen = scripted(lambda path, body, n: (302, {}))
    with pytest.raises(ConfigError, match="HTTP 302"):
        ask(make_server(url, api_key="sesame"), PROMPT, 9)
    assert len(seen) == 1


def test_answers_come_for_every_prompt_and_a_stop_ends_them_at_once(scripted) -> None:  # type: ignore[no-untyped-def]
    def slow(path: str, body: dict, n: int) -> tuple[int, dict]:
        if body["prompt"] == [19]:
            time.sleep(5)
        return completion(f"to {body['prompt'][0]}", 1)

    url, _ = scripted(slow)
    prompts = [ServerPrompt(f"r{i}", [i], (i,)) for i in range(20)]
    answers = ask_all(make_server(url), prompts[:19], 9, 4, lambda: None)
    found = {prompt.example_id: text for prompt, text in answers}
    assert found == {f"r{i}": f"to {i}" for i in range(19)}
    started = time.monotonic()

    def stop_soon() -> None:
        if time.monotonic() - started > 0.5:
            raise StoppedError("stopped")

    with pytest.raises(StoppedError):
        list(ask_all(make_server(url), prompts, 9, 2, stop_soon))
    assert time.monotonic() - started < 3


def test_a_server_that_is_not_there_is_told_before_anything_starts(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(UnavailableError, match=r"measure\.server_url.*not reachable"):
        check_reachable(make_server(url))
    train = write_varied_rows(tmp_path / "train.jsonl", 4)
    config, run = make_run(
        tmp_path, tiny_pair[1], train, None, measure=server_section(url, "student")
    )
    with pytest.raises(UnavailableError):
        check_inputs(config, run)
    with pytest.raises(UnavailableError):
        measure(config, run)


def test_answers_of_complete_shards_are_kept_and_another_server_is_refused(
    tiny_pair: Pair,
    tmp_path: Path,
    scripted,
    ray_of_module: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The server breaks down after the probe and the first shard of eight; then it goes on."""
    is_repaired = threading.Event()

    def breaking(path: str, body: dict, n: int) -> tuple[int, dict]:
        is_well = n <= 9 or is_repaired.is_set()
        return completion("the cat", len(body["prompt"])) if is_well else (400, {"error": "broken"})

    url, seen = scripted(breaking)
    monkeypatch.setenv("PLANTED_KEY", "canary-key-5f0c")
    train = write_varied_rows(tmp_path / "train.jsonl", 16)
    section = server_section(
        url, "student", "token_ids", server_concurrency=1, server_key_variable="PLANTED_KEY"
    )
    config, run = make_run(tmp_path, tiny_pair[1], train, None, measure=section)
    with pytest.raises(ConfigError, match="HTTP 400"):
        measure(config, run)
    kept = list(run.difficulty.glob("answers-*.json"))
    assert len(kept) == 1 and len(read_json(kept[0])) == 8
    assert len(seen) == 10
    is_repaired.set()
    measure(config, run)
    assert len(seen) == 10 + 1 + 8  # a probe and the other shard
    records = read_records(run.difficulty)
    assert len(records) == 16 and {record.answer for record in records} == {"the cat"}
    assert seen[-1][1]["Authorization"] == "Bearer canary-key-5f0c"
    make_plan(config, run)
    captured = capfd.readouterr()
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not any(
        b"canary" in text for text in (*files, captured.out.encode(), captured.err.encode())
    )
    other, _ = make_run(
        tmp_path, tiny_pair[1], train, None, measure={**section, "server_model": "another"}
    )
    with pytest.raises(MismatchError, match=r"measure\.server_model"):
        measure(other, run)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"engine": "server", "server_model": "m"}, r"measure\.server_url: is required"),
        ({"server_url": "http://h/v1"}, r"measure\.server_url: needs measure\.engine 'server'"),
        (server_section("ftp://h", "m"), r"measure\.server_url"),
        (server_section("http://h/v1", "m", "messages"), r"data\.template 'chat'"),
    ],
)
def test_server_keys_that_do_not_fit_are_refused(
    tiny_pair: Pair, tmp_path: Path, section: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([write_config(tmp_path, *tiny_pair, measure=section)])


def test_a_key_that_is_not_in_the_environment_is_asked_for(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    section = server_section("http://127.0.0.1:1/v1", "m", server_key_variable="NO_SUCH_KEY")
    config, run = make_run(tmp_path, tiny_pair[1], tiny_pair[2], None, measure=section)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set"):
        measure(config, run)
