"""Answers to prompts, and the cross-entropy of references. Plain models: no collectives in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pocl_dist.models.heads import (
    backbone_module,
    full_logits,
    has_linear_head,
    head_logits,
    hidden_states,
    lm_head,
)
from pocl_dist.models.part_of_a_draw import part_of_a_draw
from pocl_dist.records import IGNORE_INDEX, Batch


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is greedy."""

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int = 0

    def to_generation_config(self, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """Returns the settings for `generate`; nothing is taken from the model's own defaults."""
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        drawn = (
            {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
            if self.do_sample
            else {}
        )
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.do_sample,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
            **drawn,
        )


@torch.no_grad()
def _generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    rows: Sequence[int] | None = None,
) -> torch.Tensor:
    """Returns what `generate` appended to each prompt, (B, T); after its eos a row is padding.

    Prompts are padded on the left as one batch. Sampling draws from the seed and this batch alone,
    so a batch gives the same answers wherever and whenever it runs. With `rows` only these are
    answered: padded as the whole batch is, and from the same random numbers.
    """
    rows = range(len(prompts)) if rows is None else rows
    drawn = LogitsProcessorList()
    if sampling.do_sample and len(rows) < len(prompts):
        drawn = part_of_a_draw(sampling.temperature, sampling.top_p, len(prompts), rows)
    settings = replace(sampling, do_sample=sampling.do_sample and not drawn).to_generation_config(
        tokenizer
    )
    if sampling.do_sample:  # padding rows of the embedding have logits too, but are no tokens
        phantoms = list(range(len(tokenizer), model.config.get_text_config().vocab_size))
        settings.suppress_tokens = phantoms or None
    # generate() fills what is unset from here: a model's own repetition penalty would slip in.
    model.generation_config = settings
    longest = max(len(prompt) for prompt in prompts)
    pad = int(settings.pad_token_id)
    asked = [prompts[row] for row in rows]
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in asked]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked]
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if sampling.do_sample:
            torch.manual_seed(sampling.seed)
        output_BT = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
            logits_processor=drawn,
        )
    return output_BT[:, longest:]


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    rows: Sequence[int] | None = None,
) -> list[str]:
    """Returns one answer per prompt (token ids) as text; with `rows` those of these prompts alone.

    A part of a batch is padded, and drawn, as the whole is.
    """
    output_BT = _generated(model, tokenizer, prompts, sampling, rows)
    answers = tokenizer.batch_decode(output_BT, skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def generate_token_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> list[list[int]]:
    """Returns one answer per prompt as token ids, up to its eos; an unfinished one has no eos."""
    rows = _generated(model, tokenizer, prompts, sampling).tolist()
    eos = tokenizer.eos_token_id
    # By position: the first eos ends the answer, also where eos is the padding as well.
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


@torch.no_grad()
def mean_cross_entropies(model: PreTrainedModel, batch: Batch, num_real_tokens: int) -> list[float]:
    """Returns, per row, the mean cross-entropy of its label tokens at temperature 1, in nats, fp32.

    Row by row through the head, so that logits of a whole batch never exist at once. A head that
    is no linear map goes row by row through the whole model.
    """
    batch = batch.to(next(model.parameters()).device)
    if not has_linear_head(model, num_real_tokens):
        return _means_of_own_logits(model, batch, num_real_tokens)
    hidden_BTH = hidden_states(backbone_module(model), batch.input_ids_BT, batch.attention_mask_BT)
    head = lm_head(model, num_real_tokens)
    head = replace(head, weight_VH=head.weight_VH.float())  # once, not for every row
    means = []
    for hidden_TH, labels_T in zip(hidden_BTH, batch.labels_BT, strict=True):
        is_label = labels_T != IGNORE_INDEX
        logits_NV = head_logits(hidden_TH[is_label], head)
        means.append(float(torch.nn.functional.cross_entropy(logits_NV, labels_T[is_label])))
    return means


def _means_of_own_logits(model: PreTrainedModel, batch: Batch, num_real_tokens: int) -> list[float]:
    means = []
    for row, labels_T in enumerate(batch.labels_BT):
        is_label = labels_T != IGNORE_INDEX
        one_row = slice(row, row + 1)
        logits_BTV = full_logits(
            model, batch.input_ids_BT[one_row], batch.attention_mask_BT[one_row]
        )
        logits_NV = logits_BTV[0, is_label, :num_real_tokens].float()
        means.append(float(torch.nn.functional.cross_entropy(logits_NV, labels_T[is_label])))
    return means
