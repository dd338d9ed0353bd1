"""The dev metrics during training: every rank takes some batches, the sums meet on all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pocl_dist.config import Config
from pocl_dist.data.encoding import collate, pad_id_of
from pocl_dist.distributed.collectives import gather_floats, on_any_rank
from pocl_dist.distributed.process_group import Rank
from pocl_dist.failpoints import failpoint
from pocl_dist.metrics import rouge_l
from pocl_dist.models.generation import Sampling, generate_answers, mean_cross_entropies
from pocl_dist.pipeline.student import plain_copy
from pocl_dist.pipeline.training import Training
from pocl_dist.records import EncodedExample, Example

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = tuple[Example, EncodedExample]


def evaluate_on_dev(
    training: Training, is_stop_asked: Callable[[], bool], on_batch: Callable[[], None]
) -> None:
    """Computes the dev metric and tells the coordinator. Collective.

    A stop that is asked for meanwhile drops it: the resumed run evaluates anew.
    """
    started = time.monotonic()
    config, coordinator = training.config, training.coordinator
    policy = training.policy if training.policy and training.policy.is_adaptive else None
    wanted = [config.dev.metric] if policy is None else [config.dev.metric, "loss"]
    values = dev_metrics(
        training.engine,
        training.tokenizer,
        training.dev_rows,
        config,
        training.rank,
        wanted,
        is_stop_asked,
        on_batch,
    )
    if values is None:
        training.is_stop_asked = True
        return
    value = values[config.dev.metric]
    coordinator.record_dev(value)
    progress = coordinator.progress
    row = {
        "step": progress.step,
        "stage": progress.stage,
        "metric": config.dev.metric,
        "value": value,
    }
    if policy is not None:
        policy.record_dev_loss(values["loss"])
        row |= {"dev_loss": values["loss"], "on_policy_ratio": policy.state.ratio}
    training.record({"kind": "dev", **row, "seconds": time.monotonic() - started})
    if training.rank.is_main:
        note = " (best so far)" if progress.best_step == progress.step else ""
        training.display.note(f"step {progress.step}: dev {config.dev.metric} {value:.2f}{note}")


def dev_metrics(
    engine: DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    config: Config,
    rank: Rank,
    names: Sequence[str],
    is_stop_asked: Callable[[], bool],
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float] | None:
    """Returns {name: mean}: `rouge_l` of greedy answers in %, `loss` of references. Collective.

    Batches are a function of the rows alone, so the values do not depend on the number of ranks.
    None when a rank was asked to stop: all ranks look after each round of batches, and leave
    together.
    """
    model = plain_copy(engine)
    batches = batches_of(rows, config.generation.batch_size)
    means = {}
    for name in dict.fromkeys(names):

        def score(batch: Sequence[Row], name: str = name) -> tuple[float, float]:
            if name == "rouge_l":
                return rouge_sum(model, tokenizer, batch, config.generation.max_new_tokens)
            return _cross_entropy_sum(model, tokenizer, [item for _, item in batch])

        sums = sums_by_group([batches], 2, score, rank, is_stop_asked, on_batch)
        if sums is None:
            return None
        means[name] = sums[0][0] / sums[0][1]
    return means


def batches_of(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """Returns the rows in batches of like prompt length: a function of the rows alone."""
    ordered = sorted(rows, key=lambda row: (row[1].num_prompt_tokens, row[1].example_id))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def sums_by_group(
    groups: Sequence[Sequence[Sequence[Row]]],
    width: int,
    score: Callable[[Sequence[Row]], Sequence[float]],
    rank: Rank,
    is_stop_asked: Callable[[], bool],
    on_batch: Callable[[], None],
) -> list[list[float]] | None:
    """Returns, per group of batches, the `width` sums of what `score` says of each. Collective.

    Batches are dealt to the ranks round by round. In every round each rank calls `score`, which may
    be collective, with no rows where it has no batch left; that must count as nothing. None when a
    rank was asked to stop.
    """
    dealt = [(group, batch) for group, batches in enumerate(groups) for batch in batches]
    found: list[list[Sequence[float]]] = [[] for _ in groups]
    for first in range(0, len(dealt), rank.world_size):
        on_batch()
        failpoint("evaluate.batch")
        if on_any_rank(is_stop_asked(), rank):
            return None
        place = first + rank.index
        group, batch = dealt[place] if place < len(dealt) else (0, [])
        found[group].append(score(batch))
    mine = [math.fsum(row[i] for row in rows) for rows in found for i in range(width)]
    totals = [math.fsum(column) for column in zip(*gather_floats(mine, rank), strict=True)]
    return [totals[start : start + width] for start in range(0, len(totals), width)]


def rouge_sum(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Row],
    max_new_tokens: int,
) -> tuple[float, float]:
    """Returns the sum of ROUGE-L in % over the rows, and their number."""
    if not batch:
        return 0.0, 0.0
    prompts = [encoded.prompt_ids for _, encoded in batch]
    answers = generate_answers(model, tokenizer, prompts, Sampling(max_new_tokens))
    scores = [
        100.0 * rouge_l(answer, row.references)
        for answer, (row, _) in zip(answers, batch, strict=True)
    ]
    return math.fsum(scores), len(scores)


def _cross_entropy_sum(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EncodedExample],
) -> tuple[float, float]:
    """Returns the sum of cross-entropy over all response tokens, and their number."""
    if not examples:
        return 0.0, 0.0
    means = mean_cross_entropies(model, collate(examples, pad_id_of(tokenizer)), len(tokenizer))
    counts = [example.num_response_tokens for example in examples]
    return math.fsum(mean * n for mean, n in zip(means, counts, strict=True)), sum(counts)
