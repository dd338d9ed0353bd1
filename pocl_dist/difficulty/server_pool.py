"""Many prompts to one server at once. Loads no torch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from pocl_dist.difficulty.server import Server, ServerPrompt, ask


def ask_all(
    server: Server,
    prompts: Sequence[ServerPrompt],
    max_new_tokens: int,
    concurrency: int,
    poll: Callable[[], None],
) -> Iterator[tuple[ServerPrompt, str]]:
    """Yields (prompt, answer) as they come, begun in order, `concurrency` at once.

    `poll` is called every half second; what it raises, and the first error, ends the pass at once.
    """
    waiting: queue.SimpleQueue[ServerPrompt] = queue.SimpleQueue()
    for prompt in prompts:
        waiting.put(prompt)
    results: queue.SimpleQueue[tuple[ServerPrompt, str | Exception]] = queue.SimpleQueue()
    is_given_up = threading.Event()

    def work() -> None:
        while not is_given_up.is_set():
            try:
                prompt = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                results.put((prompt, ask(server, prompt, max_new_tokens, is_given_up)))
            except Exception as error:  # raised where the answers are wanted
                results.put((prompt, error))
                is_given_up.set()

    for _ in range(min(concurrency, len(prompts))):
        # Daemons: a process that stops does not wait minutes for requests under way.
        threading.Thread(target=work, daemon=True).start()
    try:
        num_open = len(prompts)
        while num_open:
            poll()
            try:
                prompt, result = results.get(timeout=0.5)
            except queue.Empty:
                continue
            if isinstance(result, Exception):
                raise result
            num_open -= 1
            yield prompt, result
    finally:
        is_given_up.set()
