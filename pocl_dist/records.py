"""Values that cross a file or process border. No torch, ray or deepspeed is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100


@dataclass(frozen=True)
class JSONRecord:
    """A frozen record with a JSON form; a missing or extra field is an error when read back."""

    def to_json(self) -> dict[str, object]:
        """Returns the fields as a JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, object]) -> Self:
        """Returns the record; raises ValueError when a field is missing or unknown."""
        names = {field.name for field in fields(cls)}
        if set(value) != names:
            raise ValueError(f"{cls.__name__}: fields {sorted(value)} are not {sorted(names)}")
        kept = {
            name: tuple(item) if isinstance(item, list) else item for name, item in value.items()
        }
        return cls(**kept)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Example(JSONRecord):
    """One row: the prompt and the answers that count. Training uses the first of `references`."""

    example_id: str
    prompt: str  # the instruction, or the last user message
    context: str  # the Alpaca "input"; empty when there is none
    references: tuple[str, ...]
    history: tuple[tuple[str, str], ...] = ()  # earlier messages as (role, text)


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of prompt + response + eos, and where the response starts."""

    example_id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    is_prompt_cut: bool
    is_response_cut: bool

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Returns the prompt's ids: what generation starts from."""
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def num_response_tokens(self) -> int:
        """Returns the number of tokens that are learnt, eos included."""
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch; rows may be none at all, then one masked dummy row stands in."""

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    labels_BT: torch.Tensor  # already shifted; IGNORE_INDEX where nothing is learnt
    num_tokens: int  # real tokens, padding not counted
    example_ids: tuple[str, ...] = ()  # in the order in which their labels stand, row by row
    position_ids_BT: torch.Tensor | None = None  # where rows hold several examples end to end

    @property
    def num_label_tokens(self) -> int:
        """Returns the number of valid labels."""
        return int((self.labels_BT != IGNORE_INDEX).sum())

    def only(self, rows: Sequence[int]) -> Batch:
        """Returns these rows of an unpacked batch, padded as they are."""
        picked, mask_BT = list(rows), self.attention_mask_BT[list(rows)]
        ids = tuple(self.example_ids[row] for row in picked) if self.example_ids else ()
        num_tokens = int(mask_BT.sum())
        return Batch(
            self.input_ids_BT[picked], mask_BT, self.labels_BT[picked], num_tokens, ids, None
        )

    def to(self, device: torch.device) -> Batch:
        """Returns the batch with its tensors on `device`."""
        return Batch(
            self.input_ids_BT.to(device),
            self.attention_mask_BT.to(device),
            self.labels_BT.to(device),
            self.num_tokens,
            self.example_ids,
            None if self.position_ids_BT is None else self.position_ids_BT.to(device),
        )


@dataclass(frozen=True)
class RowFailure(JSONRecord):
    """A row that a pass cannot work on, and why."""

    example_id: str
    cause: str  # "memory", "exception", "lost" (its actors died) or "not finite"
    reason: str


@dataclass(frozen=True)
class DifficultyRecord(JSONRecord):
    """What the student before training makes of one example (POCL section 3.1)."""

    example_id: str
    rouge_l: float  # F1 of its greedy answer, 0..1, higher = easier
    cross_entropy: float  # mean over response tokens and eos, nats, temperature 1, lower = easier
    num_response_tokens: int
    answer: str


@dataclass(frozen=True)
class Stage(JSONRecord):
    """One stage of the curriculum: the first `num_examples` of the ranking, at one temperature."""

    index: int
    num_examples: int
    temperature: float
    kd_ratio: float
    epochs: float
    num_steps: int


@dataclass(frozen=True)
class Plan:
    """The ranking, easy to hard, and the stages that are cut from it; what `plan.json` holds."""

    ranking: Sequence[str]
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class LMHead:
    """Maps final hidden states to logits: `softcap(logit_scale * (h @ weight_VH.T + bias_V))`.

    Rows of `weight_VH` from `num_real_tokens` on are padding of the embedding and never part of the
    softmax (151936 vs 152064 rows for one tokenizer); None means that all rows are real.
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    num_real_tokens: int | None = None


@dataclass(frozen=True)
class TeacherTopK:
    """The k most likely tokens of a teacher per position, at T = 1, and what is left for the rest.

    The tail is spread evenly over the other real tokens, which gives a whole distribution that any
    temperature can be applied to.
    """

    token_ids_NK: torch.Tensor
    logprobs_NK: torch.Tensor
    log_tail_N: torch.Tensor  # log of the probability of all other tokens together


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says of the N labelled positions: hidden states and head, top-k or logits.

    Nothing (all None) is a step without a teacher. Logits are those of the real tokens alone.
    """

    hidden_NH: torch.Tensor | None = None
    head: LMHead | None = None
    top_k: TeacherTopK | None = None
    logits_NV: torch.Tensor | None = None
