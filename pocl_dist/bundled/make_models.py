"""Writes teacher/ and student/, each with the tokenizer, and their figures: figures.json.

Run it as `python -m pocl_dist.bundled.make_models`, after make_rows; it takes about a quarter of
an hour on two CPU cores. The seed is fixed, but another machine or another version of torch may
round differently: the rows can be made again to the byte, the weights only in kind.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pocl_dist.bundled import tiny
from pocl_dist.bundled.make_rows import generated_exercises, prompt_key, read_split
from pocl_dist.bundled.tasks import Exercise
from pocl_dist.bundled.tiny import EncodedRow
from pocl_dist.bundled.tiny_tokenizer import train_tokenizer

FOLDER = Path(__file__).parent
SEED = 5695
NUM_THREADS = 2
NUM_GENERATED_ROWS = 40_000
HEAD_SIZE = 32


@dataclass(frozen=True)
class Recipe:
    """Shape and training of one model."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_rows: int
    num_steps: int
    batch_size: int
    learning_rate: float


TEACHER = Recipe(
    hidden_size=192,
    num_layers=3,
    intermediate_size=448,
    num_rows=NUM_GENERATED_ROWS,
    num_steps=3000,
    batch_size=64,
    learning_rate=1.5e-3,
)
# Stopped early and on few rows: it has to do some tasks, half do others and fail the rest.
STUDENT = Recipe(
    hidden_size=96,
    num_layers=2,
    intermediate_size=384,
    num_rows=4000,
    num_steps=380,
    batch_size=32,
    learning_rate=3e-3,
)
# The check that the student can still learn: plain distillation on the train rows.
DISTILLATION_VISITS = 5
DISTILLATION_BATCH_SIZE = 32
DISTILLATION_LEARNING_RATE = 5e-3


@dataclass(frozen=True)
class Trained:
    """A trained model and how long its training took."""

    model: LlamaForCausalLM
    seconds: float


def build(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model in float32, with no begin token and with tied embeddings."""
    num_heads = recipe.hidden_size // HEAD_SIZE
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def train(recipe: Recipe, rows: list[EncodedRow], tokenizer: PreTrainedTokenizerFast) -> Trained:
    """A model trained by the recipe on the labels of the first generated rows."""
    model = build(recipe, tokenizer)
    print(f"{model.num_parameters()} parameters, {recipe}", flush=True)
    started = time.monotonic()
    stream = tiny.batches(
        rows[: recipe.num_rows],
        batch_size=recipe.batch_size,
        pad=tokenizer.eos_token_id,
        seed=SEED,
    )
    tiny.optimise(
        model,
        stream,
        num_steps=recipe.num_steps,
        learning_rate=recipe.learning_rate,
        log_every=200,
    )
    return Trained(model, round(time.monotonic() - started, 1))


def distil(
    student: LlamaForCausalLM,
    teacher: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train_rows: list[Exercise],
) -> None:
    """Plain forward-KL distillation of `student` on the train rows, in random order."""
    rows = tiny.encode(tokenizer, train_rows)
    stream = tiny.batches(
        rows, batch_size=DISTILLATION_BATCH_SIZE, pad=tokenizer.eos_token_id, seed=SEED
    )
    tiny.optimise(
        student,
        stream,
        num_steps=DISTILLATION_VISITS * (len(rows) // DISTILLATION_BATCH_SIZE),
        learning_rate=DISTILLATION_LEARNING_RATE,
        teacher=teacher,
    )


def measured(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, exercises: list[Exercise]
) -> dict[str, float]:
    """Mean ROUGE-L and exact match in percent, and how far apart the rows' ROUGE values lie."""
    answers = tiny.answers(model, tokenizer, exercises)
    scores = [round(answer.rouge, 6) for answer in answers]
    num_rows = len(answers)
    return {
        "rouge_l": round(sum(scores) / num_rows, 2),
        "exact_match": round(100 * sum(answer.is_exact for answer in answers) / num_rows, 2),
        "fraction_nonzero_rouge": round(sum(score > 0 for score in scores) / num_rows, 4),
        "fraction_distinct_rouge": round(len(set(scores)) / num_rows, 4),
        "num_distinct_rouge": len(set(scores)),
    }


def saved_figures(
    trained: Trained,
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    splits: dict[str, list[Exercise]],
) -> dict[str, object]:
    """Saves the model with its tokenizer and returns the figures of what was saved."""
    trained.model.save_pretrained(FOLDER / name)
    tokenizer.save_pretrained(FOLDER / name)
    return {
        "num_parameters": trained.model.num_parameters(),
        "num_bytes": sum(path.stat().st_size for path in (FOLDER / name).iterdir()),
        "training_seconds": trained.seconds,
        "train": measured(trained.model, tokenizer, splits["train"]),
        "test": measured(trained.model, tokenizer, splits["test"]),
    }


def saved_teacher() -> Trained:
    """The teacher of an earlier run, with the training time that run wrote down."""
    figures = json.loads((FOLDER / "figures.json").read_text(encoding="utf-8"))
    model = LlamaForCausalLM.from_pretrained(
        FOLDER / "teacher",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    return Trained(model, figures["teacher"]["training_seconds"])


def main() -> None:
    """Trains tokenizer, teacher and student; saves; measures; writes and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--keep-teacher", action="store_true", help="train only the student; load teacher/"
    )
    keep_teacher: bool = parser.parse_args().keep_teacher
    torch.set_num_threads(NUM_THREADS)
    splits = {split: read_split(FOLDER, split) for split in ("train", "dev", "test")}
    held_out = {prompt_key(row) for row in splits["dev"] + splits["test"]}
    exercises = generated_exercises(SEED, NUM_GENERATED_ROWS, held_out)
    tokenizer = train_tokenizer(tiny.prompt_text(row) + row.output for row in exercises)
    encoded = tiny.encode(tokenizer, exercises)
    trained = {
        "teacher": saved_teacher() if keep_teacher else train(TEACHER, encoded, tokenizer),
        "student": train(STUDENT, encoded, tokenizer),
    }
    figures: dict[str, object] = {
        "command": "python -m pocl_dist.bundled.make_models",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "num_threads": NUM_THREADS,
        "vocabulary_size": len(tokenizer),
    }
    for name, model in trained.items():
        figures[name] = saved_figures(model, name, tokenizer, splits)
    student = trained["student"].model
    distil(student, trained["teacher"].model, tokenizer, splits["train"])
    figures["student_after_distillation"] = {
        "visits_per_row": DISTILLATION_VISITS,
        "batch_size": DISTILLATION_BATCH_SIZE,
        "learning_rate": DISTILLATION_LEARNING_RATE,
        "train": measured(student, tokenizer, splits["train"]),
        "test": measured(student, tokenizer, splits["test"]),
    }
    text = json.dumps(figures, indent=2) + "\n"
    (FOLDER / "figures.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
