"""Greedy answers and the cross-entropy of references from one pass over prompt + reference.

The prompt goes through the backbone once for both: its keys and values, without those of the
reference, are what the answer starts from. Plain models: no collectives in here.

Shapes: B rows, T positions, H hidden size, V vocabulary, N label positions of all rows;
K heads of keys and D their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from pocl_dist.models.generation import Sampling, generate_answers, mean_cross_entropies
from pocl_dist.models.heads import backbone_module, head_logits, lm_head
from pocl_dist.models.prompt_cache import Prompts, can_share_forward, layers_of, roomy_cache
from pocl_dist.records import IGNORE_INDEX, Batch, EncodedExample, LMHead

# Padded tokens of one forward over prompts and references. A bound of its own, because answering
# is quickest with many rows at once, and a forward over long rows with few.
FORWARD_TOKENS = 4096
# Label positions whose logits exist at once.
HEAD_TOKENS = 256
# A shorter common beginning of the prompts is not worth a forward of its own.
SHORTEST_PREFIX = 8
# Finished rows leave when they are this share: each time, the cache of the others is copied.
FINISHED_SHARE = 0.25


@dataclass(frozen=True)
class AnsweredRow:
    """A row's greedy answer and the mean cross-entropy of its reference in nats, fp32."""

    answer: str
    cross_entropy: float


def answer_and_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EncodedExample],
    batch: Batch,
    max_new_tokens: int,
    rows: Sequence[int] | None = None,
) -> list[AnsweredRow]:
    """Returns answer and cross-entropy of each row; `batch` is `examples` collated.

    With `rows` (ascending) those of these alone, each padded as it is in the whole batch.

    1. what all prompts begin with goes through the backbone once; 2. so do the rest of each prompt
    and its reference, for the cross-entropies; 3. the answers go on from the prompts, all at once.
    Models whose cache is not keys and values alone (state space, chunked attention) take two
    passes: one that scores, one that answers.
    """
    rows = range(len(examples)) if rows is None else rows
    if not can_share_forward(model):
        cross_entropies = mean_cross_entropies(model, batch.only(rows), len(tokenizer))
        ids = [example.prompt_ids for example in examples]
        answers = generate_answers(model, tokenizer, ids, Sampling(max_new_tokens), rows)
        return [AnsweredRow(*pair) for pair in zip(answers, cross_entropies, strict=True)]
    batch = batch.to(next(model.parameters()).device)
    head = lm_head(model, len(tokenizer))
    head = replace(head, weight_VH=head.weight_VH.float())  # once, not for every token
    prompts = Prompts([], [], [])
    cross_entropies = []
    with torch.no_grad():
        prefix = _prefix_cache(model, examples, batch)
        for start, end in _forward_cuts(examples):
            cut = [row for row in rows if start <= row < end]
            if cut:
                longest = max(len(example.token_ids) for example in examples[start:end]) - 1
                asked = [examples[row] for row in cut]
                part = _columns(batch.only(cut), longest)
                cross_entropies += _score(model, head, asked, part, prefix, prompts)
        longest = max(example.num_prompt_tokens for example in examples)
        eos_id = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        tokens = _continue(model, head, prompts, longest, eos_id, max_new_tokens)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    answers = [text.strip() for text in texts]
    return [AnsweredRow(*pair) for pair in zip(answers, cross_entropies, strict=True)]


def _forward_cuts(examples: Sequence[EncodedExample]) -> list[tuple[int, int]]:
    """Returns (first row, end) of each forward pass: at most FORWARD_TOKENS with padding."""
    cuts, start, longest = [], 0, 0
    for index, example in enumerate(examples):
        longest = max(longest, len(example.token_ids))
        if index > start and longest * (index + 1 - start) > FORWARD_TOKENS:
            cuts.append((start, index))
            start, longest = index, len(example.token_ids)
    return [*cuts, (start, len(examples))]


def _columns(batch: Batch, longest: int) -> Batch:
    """Returns a batch without the columns from `longest` on, padding in all of its rows."""
    return replace(
        batch,
        input_ids_BT=batch.input_ids_BT[:, :longest],
        attention_mask_BT=batch.attention_mask_BT[:, :longest],
        labels_BT=batch.labels_BT[:, :longest],
    )


def _prefix_cache(
    model: PreTrainedModel, examples: Sequence[EncodedExample], batch: Batch
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns keys and values (1, K, T, D) of what all prompts begin with: the template's head.

    Empty where that is short. The last token of a prompt is never part of it.
    """
    length = min(example.num_prompt_tokens for example in examples) - 1
    is_same_T = (batch.input_ids_BT[:, :length] == batch.input_ids_BT[:1, :length]).all(0)
    length = int(is_same_T.long().cumprod(0).sum())
    if length < SHORTEST_PREFIX or len(examples) == 1:
        return []
    cache = DynamicCache()
    backbone_module(model)(
        input_ids=batch.input_ids_BT[:1, :length],
        attention_mask=batch.attention_mask_BT[:1, :length],
        past_key_values=cache,
        use_cache=True,
    )
    return layers_of(cache)


def _score(
    model: PreTrainedModel,
    head: LMHead,
    examples: Sequence[EncodedExample],
    batch: Batch,
    prefix: list[tuple[torch.Tensor, torch.Tensor]],
    prompts: Prompts,
) -> list[float]:
    """Returns the rows' cross-entropies, and adds to `prompts` what their answers start from."""
    # Not the cache that the config asks for: layers with a window would have dropped positions.
    cache = DynamicCache()
    for index, pair in enumerate(prefix):
        cache.update(*(tensor.expand(len(examples), -1, -1, -1) for tensor in pair), index)  # type: ignore[call-arg,arg-type]
    start = prefix[0][0].shape[2] if prefix else 0
    outputs = backbone_module(model)(
        input_ids=batch.input_ids_BT[:, start:],
        attention_mask=batch.attention_mask_BT,
        past_key_values=cache,
        use_cache=True,
    )
    hidden_BTH, labels_BT = outputs.last_hidden_state, batch.labels_BT[:, start:]
    layers = layers_of(cache)
    for row, example in enumerate(examples):
        length = example.num_prompt_tokens
        prompts.hidden_H.append(hidden_BTH[row, length - 1 - start].clone())
        prompts.lengths.append(length)
        prompts.layers.append(
            [
                (keys[row, :, :length].clone(), values[row, :, :length].clone())
                for keys, values in layers
            ]
        )
    is_label_BT = labels_BT != IGNORE_INDEX
    losses = [
        torch.nn.functional.cross_entropy(head_logits(hidden_NH, head), labels_N, reduction="none")
        for hidden_NH, labels_N in zip(
            hidden_BTH[is_label_BT].split(HEAD_TOKENS),
            labels_BT[is_label_BT].split(HEAD_TOKENS),
            strict=True,
        )
    ]
    per_row = torch.cat(losses).split(is_label_BT.sum(1).tolist())
    return [float(losses_N.mean()) for losses_N in per_row]


def _continue(
    model: PreTrainedModel,
    head: LMHead,
    prompts: Prompts,
    longest: int,
    eos_id: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """Returns the most likely next tokens of each prompt, up to eos, which is left out.

    Prompts are padded on the left to `longest`.
    """
    hidden_BH = torch.stack(prompts.hidden_H)
    device = hidden_BH.device
    cache = roomy_cache(prompts, longest, max_new_tokens - 1)
    lengths_B = torch.tensor(prompts.lengths, device=device)
    columns_T = torch.arange(longest + max_new_tokens, device=device)
    mask_BT = (columns_T >= longest - lengths_B[:, None]).long()
    backbone = backbone_module(model)
    tokens: list[list[int]] = [[] for _ in prompts.lengths]
    rows = list(range(len(tokens)))  # that are in the batch
    is_open = [True] * len(tokens)
    for step in range(max_new_tokens):
        next_B = head_logits(hidden_BH, head).argmax(-1)
        for row, token in zip(rows, next_B.tolist(), strict=True):
            is_open[row] &= token != eos_id
            if is_open[row]:
                tokens[row].append(token)
        kept = [place for place, row in enumerate(rows) if is_open[row]]
        if not kept or step == max_new_tokens - 1:
            break
        if len(kept) <= (1 - FINISHED_SHARE) * len(rows):
            index_B = torch.tensor(kept, device=device)
            cache.batch_select_indices(index_B)
            next_B, lengths_B, mask_BT = next_B[index_B], lengths_B[index_B], mask_BT[index_B]
            rows = [rows[place] for place in kept]
        outputs = backbone(
            input_ids=next_B[:, None],
            attention_mask=mask_BT[:, : longest + step + 1],
            past_key_values=cache,
            use_cache=True,
            position_ids=(lengths_B + step)[:, None],
        )
        hidden_BH = outputs.last_hidden_state[:, -1]
    return tokens
