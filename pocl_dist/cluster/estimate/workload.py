"""How many rows there are and how long they are, as the models see them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowLength:
    """Tokens of a row as the model sees it: `num_tokens` go in, `num_labels` are learnt."""

    num_tokens: int
    num_labels: int

    @property
    def num_prompt(self) -> int:
        """Returns the tokens before the response."""
        return self.num_tokens + 1 - self.num_labels


@dataclass(frozen=True)
class Workload:
    """The rows of `data.train`."""

    num_rows: int
    lengths: tuple[RowLength, ...]  # of all rows, or of a sample
    longest: RowLength  # what the memory must do for: bounds, where not all rows are known
    is_sampled: bool  # false: lengths were given, all equal
    assumptions: tuple[str, ...] = ()

    @property
    def tokens_per_row(self) -> float:
        """Returns the mean tokens that go in."""
        return sum(row.num_tokens for row in self.lengths) / len(self.lengths)

    @property
    def labels_per_row(self) -> float:
        """Returns the mean tokens that are learnt."""
        return sum(row.num_labels for row in self.lengths) / len(self.lengths)

    @property
    def squares_per_row(self) -> float:
        """Returns the mean square of a row's length, which attention costs."""
        return sum(row.num_tokens**2 for row in self.lengths) / len(self.lengths)
