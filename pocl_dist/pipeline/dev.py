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
    rows: Sequence[tuple[Example, EncodedExample]],
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
    ordered = sorted(rows, key=lambda row: (row[1].num_prompt_tokens, row[1].example_id))
    size = config.generation.batch_size
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    means = {}
    for name in dict.fromkeys(names):
        totals = [(0.0, 0)]
        for first in range(0, len(batches), rank.world_size):
            on_batch()
            failpoint("evaluate.batch")
            if on_any_rank(is_stop_asked(), rank):
                return None
            if first + rank.index >= len(batches):
                continue
            batch = batches[first + rank.index]
            if name == "rouge_l":
                totals.append(_rouge_sum(model, tokenizer, batch, config.generation.max_new_tokens))
            else:
                totals.append(_cross_entropy_sum(model, tokenizer, [item for _, item in batch]))
        mine = [math.fsum(total for total, _ in totals), sum(count for _, count in totals)]
        sums = gather_floats(mine, rank)
        means[name] = math.fsum(row[0] for row in sums) / math.fsum(row[1] for row in sums)
    return means


def _rouge_sum(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[Example, EncodedExample]],
    max_new_tokens: int,
) -> tuple[float, int]:
    """Returns the sum of ROUGE-L in % over the rows, and their number."""
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
) -> tuple[float, int]:
    """Returns the sum of cross-entropy over all response tokens, and their number."""
    means = mean_cross_entropies(model, collate(examples, pad_id_of(tokenizer)), len(tokenizer))
    counts = [example.num_response_tokens for example in examples]
    return math.fsum(mean * n for mean, n in zip(means, counts, strict=True)), sum(counts)
