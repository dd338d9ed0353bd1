"""The student answers the prompts of a global batch; every rank gets all answers.

The calls are cut from the global batch alone (`policy.batch_size` prompts each), and each draws
from its own seed, so the answers do not depend on the number of ranks. The model is a whole copy on
every rank: no collective happens while tokens are generated, so ranks whose answers end early wait
only once, where the answers are exchanged.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_dist.config import Config
from pocl_dist.distributed.collectives import gather_int_lists
from pocl_dist.distributed.process_group import Rank
from pocl_dist.failpoints import failpoint
from pocl_dist.models.generation import Sampling, generate_token_ids
from pocl_dist.on_policy.replay_buffer import with_answer
from pocl_dist.records import EncodedExample


def calls_of(examples: Sequence[EncodedExample], batch_size: int) -> list[list[int]]:
    """Returns the positions of a global batch, sorted by prompt length, cut into calls.

    A global batch may hold an example twice: positions, not ids, tell the two apart.
    """
    lengths = [example.num_prompt_tokens for example in examples]
    order = sorted(range(len(examples)), key=lambda position: (lengths[position], position))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def sampling_of(config: Config) -> Sampling:
    """Returns how the student's answers are drawn; the seed is set for each call."""
    policy = config.policy
    return Sampling(
        max_new_tokens=policy.max_new_tokens or config.generation.max_new_tokens,
        do_sample=True,
        temperature=policy.temperature,
        top_p=policy.top_p,
    )


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EncodedExample],
    config: Config,
    step: int,
    rank: Rank,
    is_stop_asked: Callable[[], bool],
) -> list[EncodedExample] | None:
    """Returns the examples with the model's sampled answers as responses, in order. Collective.

    An answer ends with eos, unless `policy.max_new_tokens` or `data.max_tokens` cuts it; an empty
    one is eos alone, so every row has a label. None when a rank was asked to stop: that rank gives
    up at once, and the others learn of it where the answers are exchanged.
    """
    calls = calls_of(examples, config.policy.batch_size)
    sampling, max_tokens = sampling_of(config), config.data.max_tokens
    # Whether this rank gave up; then position, number of tokens, tokens for each of its answers.
    mine: list[int] = [0]
    for index in range(rank.index, len(calls), rank.world_size):
        failpoint("generate.call")
        if is_stop_asked():
            mine = [1]
            break
        prompts = [examples[position].prompt_ids for position in calls[index]]
        rooms = [max_tokens - len(prompt) for prompt in prompts]
        drawn = replace(
            sampling,
            max_new_tokens=min(sampling.max_new_tokens, max(rooms)),
            seed=zlib.crc32(f"{config.seed}/{step}/{index}".encode()),
        )
        answers = generate_token_ids(model, tokenizer, prompts, drawn)
        for position, room, answer in zip(calls[index], rooms, answers, strict=True):
            kept = answer[:room]
            mine += [position, len(kept), *kept]
    answer_of: dict[int, list[int]] = {}
    rows = gather_int_lists(mine, rank)
    if any(row[0] for row in rows):
        return None
    for row in rows:
        at = 1
        while at < len(row):
            position, length = row[at : at + 2]
            answer_of[position] = row[at + 2 : at + 2 + length]
            at += 2 + length
    eos = tokenizer.eos_token_id
    return [
        with_answer(example, answer_of[position], is_cut=answer_of[position][-1] != eos)
        for position, example in enumerate(examples)
    ]
