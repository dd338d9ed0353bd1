"""The student's latest answers, kept to be trained on again.

The off-policy part of DistiLLM (arXiv 2402.03898, section 3.2).

Every rank holds the same one: all add the same answers in the same order and draw by the same
numbers. A checkpoint keeps it as tensors; prompts are not stored, they are the data set's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from pocl_dist.records import EncodedExample

KIND = "replay"  # prefix of its tensors in a checkpoint


class ReplayBuffer:
    """A ring of at most `capacity` answers; a new one takes the place of the oldest."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._answers: deque[EncodedExample] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def is_full(self) -> bool:
        """Returns whether the next answer pushes one out."""
        return len(self._answers) == self.capacity

    def add(self, answers: Iterable[EncodedExample]) -> None:
        """Puts answers in, in their order."""
        self._answers.extend(answers)

    def sample(self, num_answers: int, generator: np.random.Generator) -> list[EncodedExample]:
        """Returns `num_answers` of its answers, each at most once."""
        places = generator.choice(len(self._answers), size=num_answers, replace=False)
        return [self._answers[int(place)] for place in places]

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the answers, oldest first, as CPU tensors (N answers, of L tokens together).

        `token_ids_L` int32; `lengths_N` int32; `is_cut_N` bool; `example_ids` the bytes of all ids,
        each with a NUL at its end (no id holds one).
        """
        responses = [answer.token_ids[answer.num_prompt_tokens :] for answer in self._answers]
        names = b"".join(answer.example_id.encode() + b"\0" for answer in self._answers)
        return {
            "token_ids_L": torch.tensor([t for ids in responses for t in ids], dtype=torch.int32),
            "lengths_N": torch.tensor([len(ids) for ids in responses], dtype=torch.int32),
            "is_cut_N": torch.tensor([a.is_response_cut for a in self._answers], dtype=torch.bool),
            "example_ids": torch.from_numpy(np.frombuffer(names, dtype=np.uint8).copy()),
        }

    def restore(
        self, tensors: Mapping[str, torch.Tensor], encoded: Mapping[str, EncodedExample]
    ) -> None:
        """Sets what `to_tensors` gave; prompts come from `encoded`, by example id."""
        names = stored_ids(tensors)
        token_ids: Sequence[int] = tensors["token_ids_L"].tolist()
        self._answers.clear()
        start = 0
        rows = zip(names, tensors["lengths_N"].tolist(), tensors["is_cut_N"].tolist(), strict=True)
        for name, length, is_cut in rows:
            answer_ids = token_ids[start : start + length]
            self._answers.append(with_answer(encoded[name], answer_ids, is_cut))
            start += length


def stored_ids(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Returns the ids of the answers that `to_tensors` gave, each as often as it is there."""
    return bytes(tensors["example_ids"].tolist()).decode().split("\0")[:-1]


def with_answer(example: EncodedExample, answer_ids: Sequence[int], is_cut: bool) -> EncodedExample:
    """Returns the example with another response: its prompt, then `answer_ids` (eos included)."""
    return EncodedExample(
        example_id=example.example_id,
        token_ids=(*example.prompt_ids, *answer_ids),
        num_prompt_tokens=example.num_prompt_tokens,
        is_prompt_cut=example.is_prompt_cut,
        is_response_cut=is_cut,
    )
