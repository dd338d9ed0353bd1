"""What the loss refuses: shapes, vocabularies, labels and token ids that do not fit each other."""

from __future__ import annotations

import math

import torch

from pocl_dist.records import IGNORE_INDEX, LMHead, TeacherOutput


def check_teacher(teacher: TeacherOutput, labels_N: torch.Tensor, vocabulary_size: int) -> None:
    """Raises ValueError unless the teacher is complete, of one form, and fits labels and student.

    Token ids are checked here because an index out of range ends the process on a GPU.
    """
    hidden_NH, head, top_k = teacher.hidden_NH, teacher.head, teacher.top_k
    if (hidden_NH is None) != (head is None):
        raise ValueError("teacher hidden states and teacher head go together: give both or none")
    if top_k is not None:
        if head is not None:
            raise ValueError("teacher_top_k takes the place of teacher hidden states and head")
        num_kept = top_k.token_ids_NK.shape[-1]
        if top_k.token_ids_NK.shape != (len(labels_N), num_kept):
            raise ValueError(
                f"teacher_top_k: {tuple(top_k.token_ids_NK.shape)} must be (N, K) for "
                f"{len(labels_N)} labels"
            )
        if not 0 < num_kept <= vocabulary_size:
            raise ValueError(f"teacher_top_k: K {num_kept} must be in [1, {vocabulary_size}]")
        if len(labels_N):
            low, high = (int(x) for x in top_k.token_ids_NK.aminmax())
            if low < 0 or high >= vocabulary_size:
                outside = low if low < 0 else high
                raise ValueError(
                    f"teacher_top_k: token {outside} must be in [0, {vocabulary_size})"
                )
    if hidden_NH is not None and head is not None:
        check_shapes(hidden_NH, head, labels_N, "teacher")
        teacher_size = real_tokens("teacher", head)
        if teacher_size != vocabulary_size:
            raise ValueError(
                f"teacher has {teacher_size} real tokens and student {vocabulary_size}: one "
                "tokenizer is needed; padding of the head goes into LMHead.num_real_tokens"
            )


def valid_rows(labels_N: torch.Tensor, vocabulary_size: int) -> torch.Tensor:
    """Returns the indices of the labelled rows; raises ValueError for a label that is no token.

    Checked here because on a GPU an index out of range ends the process, without a message.
    """
    valid_rows_M = (labels_N != IGNORE_INDEX).nonzero().squeeze(1)
    if len(valid_rows_M):
        low, high = (int(x) for x in labels_N[valid_rows_M].aminmax())
        if low < 0 or high >= vocabulary_size:
            outside = low if low < 0 else high
            raise ValueError(
                f"labels_N: {outside} must be {IGNORE_INDEX} or in [0, {vocabulary_size})"
            )
    return valid_rows_M


def real_tokens(role: str, head: LMHead) -> int:
    """Returns how many leading rows of the head's weight are tokens and not padding."""
    num_rows = head.weight_VH.shape[0]
    num_real = num_rows if head.num_real_tokens is None else head.num_real_tokens
    if not 0 < num_real <= num_rows:
        raise ValueError(f"{role} head: num_real_tokens {num_real} must be in [1, {num_rows}]")
    return num_real


def check_shapes(hidden_NH: torch.Tensor, head: LMHead, labels_N: torch.Tensor, role: str) -> None:
    """Raises ValueError unless hidden states, head and labels fit each other."""
    num_rows, hidden_size = head.weight_VH.shape
    if hidden_NH.shape != (*labels_N.shape, hidden_size) or labels_N.dim() != 1:
        raise ValueError(
            f"{role} hidden states {tuple(hidden_NH.shape)} must be (N, {hidden_size}) for labels "
            f"{tuple(labels_N.shape)} of shape (N,)"
        )
    if head.bias_V is not None and head.bias_V.shape != (num_rows,):
        raise ValueError(f"{role} head: bias {tuple(head.bias_V.shape)} must be ({num_rows},)")
    if head.softcap is not None and not (math.isfinite(head.softcap) and head.softcap > 0):
        raise ValueError(f"{role} head: softcap {head.softcap} must be finite and above 0, or None")
