"""The dev metric during training: every rank takes some batches, the sums meet on all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pocl_dist.config import Config
from pocl_dist.data.encoding import collate, pad_id_of
from pocl_dist.distributed.collectives import gather_floats
from pocl_dist.distributed.process_group import Rank
from pocl_dist.metrics import rouge_l
from pocl_dist.models.generation import Sampling, generate_answers, mean_cross_entropies
from pocl_dist.pipeline.student import plain_copy
from pocl_dist.records import EncodedExample, Example

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedTokenizerBase


def dev_metric(
    engine: DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Example, EncodedExample]],
    config: Config,
    rank: Rank,
    on_batch: Callable[[], None] = lambda: None,
) -> float:
    """Returns ROUGE-L of greedy answers in %, or the references' mean cross-entropy. Collective.

    Batches are a function of the rows alone, so the value does not depend on the number of ranks.
    """
    model = plain_copy(engine)
    ordered = sorted(rows, key=lambda row: (row[1].num_prompt_tokens, row[1].example_id))
    size = config.generation.batch_size
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    sampling = Sampling(config.generation.max_new_tokens)
    total, count = 0.0, 0.0
    for batch in batches[rank.index :: rank.world_size]:
        on_batch()
        if config.dev.metric == "rouge_l":
            answers = generate_answers(
                model, tokenizer, [encoded.prompt_ids for _, encoded in batch], sampling
            )
            pairs = zip(answers, batch, strict=True)
            total += math.fsum(
                100.0 * rouge_l(answer, row.references) for answer, (row, _) in pairs
            )
            count += len(batch)
        else:
            encoded = [item for _, item in batch]
            means = mean_cross_entropies(
                model, collate(encoded, pad_id_of(tokenizer)), len(tokenizer)
            )
            total += math.fsum(
                mean * item.num_response_tokens for mean, item in zip(means, encoded, strict=True)
            )
            count += sum(item.num_response_tokens for item in encoded)
    sums = gather_floats([total, count], rank)
    return math.fsum(row[0] for row in sums) / math.fsum(row[1] for row in sums)
