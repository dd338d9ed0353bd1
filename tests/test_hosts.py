"""Hostfiles, ssh's options, and the agreement of ranks on what they run."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pocl_dist.config import LaunchConfig, load_config
from pocl_dist.errors import ConfigError, MissingInputError, UnavailableError
from pocl_dist.hosts import (
    Host,
    check_port_here,
    chosen_hosts,
    read_hostfile,
    ssh_options,
)
from pocl_dist.pipeline.rank_launcher import check_can_start, launch_environment
from tests.tiny import write_config, write_llama, write_rows


def test_a_hostfile_is_read_as_the_launcher_reads_it(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_text("# of the lab\n\nnode-1 slots=8\nnode2.lab   slots=4\n10.0.0.3 slots=1\n")
    ours = {host.name: host.slots for host in read_hostfile(path)}
    assert ours == dict(fetch_hostfile(str(path)))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "names no host"),
        ("# nothing\n", "names no host"),
        ("h1\n", "line 1: 'h1' is not `HOST slots=N`"),
        ("h1 slots=2\nh2 slots=two\n", "line 2"),
        ("h1 slots=0\n", "line 1"),
        ("h1 slots=2\nh1 slots=2\n", "line 2: h1 is there twice"),
        ("-oProxyCommand=reboot slots=2\n", "line 1"),
        ("h1;reboot slots=2\n", "line 1"),
    ],
)
def test_a_bad_hostfile_is_refused_by_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        read_hostfile(path)
    assert str(path) in str(caught.value)


def test_a_missing_hostfile_is_no_run_on_this_machine_alone(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"launch\.hostfile: .*none does not exist"):
        read_hostfile(tmp_path / "none")


def test_the_first_hosts_are_taken_and_each_must_have_the_slots(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("h1 slots=4\nh2 slots=4\nh3 slots=2\n")
    two = LaunchConfig(nodes=2, gpus_per_node=4, hostfile="hosts")
    assert chosen_hosts(two, tmp_path) == (Host("h1", 4), Host("h2", 4))
    with pytest.raises(ConfigError, match=r"h3 has slots=2 .* 4 ranks"):
        chosen_hosts(two.model_copy(update={"nodes": 3}), tmp_path)
    with pytest.raises(ConfigError, match=r"launch\.nodes: 4, but hosts names 3 host"):
        chosen_hosts(two.model_copy(update={"nodes": 4}), tmp_path)


def test_ssh_never_asks_and_gives_up_a_dead_link_in_the_time_that_is_set() -> None:
    for seconds in (2, 15, 60):
        words = ssh_options(LaunchConfig(dead_link_seconds=seconds))
        options = dict(word.split("=") for word in words if "=" in word)
        assert options["BatchMode"] == "yes"
        alive = int(options["ServerAliveInterval"]) * int(options["ServerAliveCountMax"])
        assert alive <= max(seconds, 3)


def test_a_port_in_use_is_told_before_ranks_are_started() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UnavailableError, match=rf"launch\.master_port: {port} is in use"):
            check_port_here(port)
    check_port_here(port)


def _config(folder: Path, **launch: object) -> Path:
    student = write_llama(folder / "student", hidden=16, layers=1, seed=0)
    rows = write_rows(folder / "rows.jsonl", 8)
    return write_config(folder, None, student, rows, launch=launch)


def test_machines_that_do_not_fit_start_nothing(tmp_path: Path) -> None:
    config = load_config([_config(tmp_path, ranks_with="torchrun", nodes=2, gpus_per_node=0)])
    with pytest.raises(ConfigError, match=r"engine\.(world_size|global_batch_size)"):
        check_can_start(
            config.model_copy(update={"engine": config.engine.model_copy(update={"world_size": 3})})
        )


def test_several_nodes_are_not_trained_on_one_in_silence(tmp_path: Path) -> None:
    config = load_config([_config(tmp_path, nodes=2)])
    alone = config.model_copy(
        update={"engine": config.engine.model_copy(update={"world_size": None})}
    )
    with pytest.raises(ConfigError, match=r"launch\.nodes: 2, .*this machine only"):
        check_can_start(alone)


def test_a_file_of_launch_gets_the_variables_that_its_head_names(tmp_path: Path) -> None:
    path = _config(
        tmp_path,
        ranks_with="deepspeed",
        nodes=2,
        gpus_per_node=0,
        hostfile="hosts",
        environment={"GLOO_SOCKET_IFNAME": "eth0"},
    )
    found = launch_environment(load_config([path]), "distill")
    assert found["NUM_NODES"] == "2" and found["RANKS_PER_NODE"] == "1"
    assert found["HOSTFILE"] == "hosts" and found["LAUNCH_VARIABLES"] == "GLOO_SOCKET_IFNAME"
    assert found["GLOO_SOCKET_IFNAME"] == "eth0" and found["POCL_DIST_VISIBLE_DEVICES"] == ""
