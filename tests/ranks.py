"""Runs a function on several real ranks (gloo), cheaply: forked from a parent that imported all."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.queues import Queue

from pocl_dist.free_port import free_port

_PRELOAD = [
    "torch",
    "deepspeed",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "transformers.generation",
    "pocl_dist.pipeline.distill",
    "tests.ranks",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)


def _child(
    fn: Callable[..., object], args: tuple, rank: int, world_size: int, port: int, results: Queue
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": "2",  # the same threads for every world size: one
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    try:
        results.put((rank, fn(*args), None))
    except BaseException as error:
        results.put((rank, None, (type(error).__name__, str(error), traceback.format_exc())))
    results.close()
    results.join_thread()
    os._exit(0)


def start_ranks(fn: Callable[..., object], world_size: int, *args: object) -> tuple[list, Queue]:
    """Starts `fn(*args)` on every rank; returns the processes and the queue of their results."""
    results: Queue = _context.Queue()
    port = free_port()
    processes = [
        _context.Process(
            target=_child, args=(fn, args, rank, world_size, port, results), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes, results


def run_ranks_with_errors(
    fn: Callable[..., object], world_size: int, *args: object, timeout: float = 120
) -> list:
    """Returns (value, error) per rank, in order; error is (class name, message, traceback)."""
    processes, results = start_ranks(fn, world_size, *args)
    try:
        rows = sorted((results.get(timeout=timeout) for _ in processes), key=lambda row: row[0])
        return [(value, error) for _, value, error in rows]
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def run_ranks(
    fn: Callable[..., object], world_size: int, *args: object, timeout: float = 120
) -> list:
    """Returns the values of all ranks; an error of any rank fails the test with its traceback."""
    rows = run_ranks_with_errors(fn, world_size, *args, timeout=timeout)
    for _, error in rows:
        assert error is None, error[2]
    return [value for value, _ in rows]
