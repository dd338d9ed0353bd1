"""Tiny models with random weights, and configs over them: real code on little work."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import yaml
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "red",
    "mat",
    "and",
    "then",
    "it",
    "ran",
    "far",
    "away",
    "from",
    "one",
    "big",
    "dog",
    "under",
    "two",
    "old",
    "trees",
]


def write_rows(path: Path, num_rows: int) -> Path:
    """Writes rows, all different, with prompts and responses of uneven lengths."""
    lines = []
    for index in range(num_rows):
        words = random.Random(index).choices(WORDS, k=1 + index % 6)
        row = {
            "id": f"row-{index:03d}",
            "instruction": "say " + " ".join(words),
            "input": "",
            "output": " ".join(words[::-1]),
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer with one special token that is both eos and pad."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [" ".join(WORDS), "say ### Instruction: Response:"] * 4,
        vocab_size=320,
        special_tokens=[EOS],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token=EOS, pad_token=EOS
    )


def write_llama(
    folder: Path, hidden: int, layers: int, seed: int, is_tied: bool = True, num_phantom: int = 0
) -> Path:
    """Writes a Llama with random weights that are large enough for its logits to differ."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + num_phantom, hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=is_tied,
        initializer_range=0.2, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def results_in(run_dir: Path) -> dict[str, bytes]:
    """Returns the files of a run by name; the rows that were read well are no result."""
    files = {p.relative_to(run_dir).as_posix(): p for p in run_dir.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if not name.startswith("rows/")}


def write_config(
    folder: Path, teacher: Path | None, student: Path, train: Path, /, **sections: object
) -> Path:
    """Writes a config over tiny models; `sections` are merged over small defaults."""
    value: dict = {
        "run_dir": str(folder / "run"),
        "models": {
            "teacher": {"path": str(teacher)} if teacher else None,
            "student": {"path": str(student)},
        },
        "data": {
            "train": str(train),
            "template": "short",
            "max_tokens": 64,
            "max_prompt_tokens": 48,
        },
        "curriculum": {"num_stages": 2, "epochs_per_stage": 2, "ordering": "shuffled"},
        "dev": {"quarter_rows": 0},
        "generation": {"max_new_tokens": 6, "batch_size": 8},
        "optimizer": {"learning_rate": 1e-3},
        "engine": {"micro_batch_size": 3, "global_batch_size": 8},
        "log": {"trackers": []},
    }
    for section, keys in sections.items():
        value[section] = {**value.get(section, {}), **keys} if isinstance(keys, dict) else keys  # type: ignore[dict-item]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(value))
    return path
