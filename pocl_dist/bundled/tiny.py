"""Training and greedy answering for the tiny bundled models; needs nothing else of the project.

Shapes: B batch, T positions, V vocabulary, N valid tokens (output tokens and the end token).
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped, unused-ignore]
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pocl_dist.bundled.tasks import Exercise

IGNORE_INDEX = -100
MAX_NEW_TOKENS = 24
ANSWER_BATCH_SIZE = 100

# Token ids of a prompt, and of its output with the end token.
EncodedRow = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids; `labels_BT` already names the next token at each position."""

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    labels_BT: torch.Tensor


@dataclass(frozen=True)
class Answer:
    """What a model said to one exercise; `rouge` is ROUGE-L F1 in percent."""

    text: str
    rouge: float
    is_exact: bool


def prompt_text(exercise: Exercise) -> str:
    """The prompt in the project's template named `short`."""
    content = exercise.instruction
    if exercise.input:
        content += "\n" + exercise.input
    return f"### Instruction:\n{content}\n\n### Response:\n"


def encode(tokenizer: PreTrainedTokenizerFast, exercises: list[Exercise]) -> list[EncodedRow]:
    """Token ids of each prompt and of its output with the end token."""
    prompts = tokenizer([prompt_text(exercise) for exercise in exercises])["input_ids"]
    outputs = tokenizer([exercise.output for exercise in exercises])["input_ids"]
    eos = tokenizer.eos_token_id
    return [(prompt, [*output, eos]) for prompt, output in zip(prompts, outputs, strict=True)]


def collate(rows: list[EncodedRow], pad: int) -> Batch:
    """One batch of encoded rows, as long as its longest row."""
    length = max(len(prompt) + len(output) for prompt, output in rows) - 1
    input_ids_BT = torch.full((len(rows), length), pad)
    labels_BT = torch.full((len(rows), length), IGNORE_INDEX)
    attention_mask_BT = torch.zeros((len(rows), length), dtype=torch.long)
    for row, (prompt, output) in enumerate(rows):
        num_inputs = len(prompt) + len(output) - 1
        input_ids_BT[row, :num_inputs] = torch.tensor([*prompt, *output[:-1]])
        labels_BT[row, len(prompt) - 1 : num_inputs] = torch.tensor(output)
        attention_mask_BT[row, :num_inputs] = 1
    return Batch(input_ids_BT, attention_mask_BT, labels_BT)


def batches(rows: list[EncodedRow], *, batch_size: int, pad: int, seed: int) -> Iterator[Batch]:
    """Batches of rows of similar length, epoch after epoch, each in a new random order."""
    rng = random.Random(seed)
    while True:
        # The random part of the key keeps batches from being the same in every epoch.
        order = sorted(rows, key=lambda row: len(row[0]) + len(row[1]) + 4 * rng.random())
        starts = list(range(0, len(order) - batch_size + 1, batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield collate(order[start : start + batch_size], pad)


def logits_of_outputs(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """logits_NV at the positions that have a label; the others are never computed."""
    hidden_BTD = model.model(
        input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
    ).last_hidden_state
    logits_NV: torch.Tensor = model.lm_head(hidden_BTD[batch.labels_BT != IGNORE_INDEX])
    return logits_NV


def optimise(
    model: LlamaForCausalLM,
    stream: Iterator[Batch],
    *,
    num_steps: int,
    learning_rate: float,
    teacher: LlamaForCausalLM | None = None,
    log_every: int = 0,
) -> None:
    """Trains `model` with AdamW and a cosine schedule, on the labels or on a teacher.

    With a teacher the loss is the forward KL divergence from its next-token distribution.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    num_warmup = max(1, num_steps // 20)
    model.train()
    for step, batch in zip(range(num_steps), stream, strict=False):
        fraction = max(0.0, (step - num_warmup) / max(1, num_steps - num_warmup))
        decay = 0.02 + 0.49 * (1 + math.cos(math.pi * fraction))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * decay * min(1.0, (step + 1) / num_warmup)
        logits_NV = logits_of_outputs(model, batch)
        if teacher is None:
            labels_N = batch.labels_BT[batch.labels_BT != IGNORE_INDEX]
            loss_mean = functional.cross_entropy(logits_NV.float(), labels_N)
        else:
            with torch.no_grad():
                target_NV = logits_of_outputs(teacher, batch).float().log_softmax(-1)
            loss_mean = functional.kl_div(
                logits_NV.float().log_softmax(-1), target_NV, log_target=True, reduction="batchmean"
            )
        optimizer.zero_grad(set_to_none=True)
        loss_mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if log_every and (step + 1) % log_every == 0:
            print(f"step {step + 1}/{num_steps} loss {loss_mean.item():.4f}", flush=True)
    model.eval()


@torch.no_grad()
def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, exercises: list[Exercise]
) -> list[Answer]:
    """The greedy answer to each exercise with its score, in the order given."""
    model.eval()
    texts: dict[int, str] = {}
    prompts = [prompt for prompt, _ in encode(tokenizer, exercises)]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), ANSWER_BATCH_SIZE):
        indices = order[start : start + ANSWER_BATCH_SIZE]
        length = len(prompts[indices[-1]])
        input_ids_BT = torch.full((len(indices), length), tokenizer.pad_token_id)
        attention_mask_BT = torch.zeros_like(input_ids_BT)
        for row, index in enumerate(indices):  # padded on the left: all answers start together
            input_ids_BT[row, length - len(prompts[index]) :] = torch.tensor(prompts[index])
            attention_mask_BT[row, length - len(prompts[index]) :] = 1
        tokens_BT = model.generate(  # type: ignore[misc, unused-ignore]
            input_ids_BT,
            attention_mask=attention_mask_BT,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        decoded = tokenizer.batch_decode(tokens_BT[:, length:], skip_special_tokens=True)
        texts |= dict(zip(indices, decoded, strict=True))
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        Answer(
            text=texts[index],
            rouge=100 * scorer.score(exercise.output, texts[index])["rougeL"].fmeasure,
            is_exact=texts[index] == exercise.output,
        )
        for index, exercise in enumerate(exercises)
    ]
