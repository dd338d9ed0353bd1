"""Whether teacher and student belong together. Loads neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pocl_dist.errors import MismatchError


class Vocabulary(Protocol):
    """What two tokenizers are compared by; transformers' have it, and so has `PlainTokenizer`."""

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends an answer."""

    def get_vocab(self) -> Mapping[str, int]:
        """Returns {token: id}, added tokens included."""


def check_same_tokenizer(teacher: Vocabulary, student: Vocabulary) -> None:
    """Raises MismatchError (78) unless both map every token to the same id and share eos.

    Equal sizes are not enough: column i of both softmaxes must mean the same token.
    """
    first, second = teacher.get_vocab(), student.get_vocab()
    if first == second and teacher.eos_token_id == student.eos_token_id:
        return
    reasons = [f"teacher {len(first)} tokens, student {len(second)} tokens"]
    for token in sorted(set(first) | set(second)):
        if first.get(token) != second.get(token):
            reasons.append(f"token {token!r} is id {first.get(token)} and {second.get(token)}")
            break
    if teacher.eos_token_id != student.eos_token_id:
        reasons.append(f"eos is id {teacher.eos_token_id} and {student.eos_token_id}")
    raise MismatchError(
        "models.teacher and models.student have different tokenizers: " + "; ".join(reasons) + ". "
        "White-box distillation compares the two vocabularies column by column."
    )


def check_head_rows(num_rows: int | None, num_tokens: int, key: str) -> None:
    """Raises MismatchError (78) when a tokenizer has tokens for which the head has no row.

    More rows than tokens are padding; `num_rows` None is not known.
    """
    if num_rows is not None and num_rows < num_tokens:
        raise MismatchError(
            f"{key}: its tokenizer has {num_tokens} tokens, its head {num_rows} rows: tokens were "
            "added without the model; use the tokenizer that the model was trained with"
        )
