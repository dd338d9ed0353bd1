"""Template, tokens, the one label mask, and batches.

Shapes: B rows, T positions. Labels are shifted here and nowhere else: `labels[t]` is the token that
position t has to predict. The mask goes by position, never by token id, so eos is learnt even where
pad equals eos. torch is loaded only where a batch is made: `doctor` encodes rows without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from jinja2 import TemplateError

from pocl_dist.errors import ConfigError, DataError, MismatchError
from pocl_dist.records import IGNORE_INDEX, Batch, EncodedExample, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ALPACA = (
    "Below is an instruction that describes a task{more}. "
    "Write a response that appropriately completes the request.\n\n"
)
_WITH_CONTEXT = ", paired with an input that provides further context"


class TextTokenizer(Protocol):
    """What an encoder asks of a tokenizer: transformers' have it, and so has ours without torch."""

    @property
    def name_or_path(self) -> str:
        """Where it was read from."""

    @property
    def chat_template(self) -> str | None:
        """Template of messages; None without one."""

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends an answer."""

    def __call__(
        self, text: str, *, add_special_tokens: bool, verbose: bool
    ) -> Mapping[str, list[int]]:
        """Returns `input_ids` of a text."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> str:
        """Returns messages as the model reads them."""


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt. Only `content` may be cut, on its left; the markers around it stay."""

    prefix: str
    content: str
    suffix: str


class Encoder:
    """Renders and tokenises examples for one tokenizer and template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | TextTokenizer,
        template: str,
        max_tokens: int,
        max_prompt_tokens: int,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise MismatchError(
                f"the tokenizer {tokenizer.name_or_path} has no eos token: "
                "nothing can end an answer"
            )
        if template == "chat" and not tokenizer.chat_template:
            raise ConfigError(
                "data.template: 'chat' is not possible: "
                f"the tokenizer {tokenizer.name_or_path} has no chat template"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.max_tokens = max_tokens
        self.max_prompt_tokens = max_prompt_tokens

    def render(self, example: Example) -> Prompt:
        """Returns the prompt of an example under the template."""
        if self.template == "chat":
            return self._render_chat(example)
        return render_plain(self.template, example)

    def _render_chat(self, example: Example) -> Prompt:
        messages = chat_messages(example)
        content = messages[-1]["content"]
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False
                )
            )
        except TemplateError as error:
            raise DataError(
                f"row {example.example_id!r}: the chat template refuses its messages: {error}"
            ) from error
        before, found, after = text.rpartition(content)
        if not found:
            raise ConfigError(
                "data.template: the tokenizer's chat template changes the text of the message"
            )
        return Prompt(before, content, after)

    def _ids(self, text: str, with_special: bool = False) -> list[int]:
        ids = list(
            self.tokenizer(text, add_special_tokens=with_special, verbose=False)["input_ids"]
        )
        if with_special and ids and ids[-1] == self.tokenizer.eos_token_id and ids[0] != ids[-1]:
            ids.pop()  # a tokenizer that closes every text: the prompt is not the end
        return ids

    def encode_prompt(self, example: Example) -> tuple[list[int], bool]:
        """Returns the prompt's ids and whether something had to be cut.

        Under `chat` the earlier turns stand before the content: the oldest go first.
        """
        with_special = self.template != "chat"  # a chat template writes its own
        kept, is_cut = example, False
        while True:
            prompt = self.render(kept)
            ids = self._ids(prompt.prefix + prompt.content + prompt.suffix, with_special)
            if len(ids) <= self.max_prompt_tokens:
                return ids, is_cut
            before, after = self._ids(prompt.prefix, with_special), self._ids(prompt.suffix)
            room = self.max_prompt_tokens - len(before) - len(after)
            if room >= 1:
                return before + self._ids(prompt.content)[-room:] + after, True
            if self.template != "chat" or not kept.history:
                raise ConfigError(
                    f"data.max_prompt_tokens: {self.max_prompt_tokens} leaves no room: "
                    f"the template alone takes {len(before) + len(after)} tokens"
                )
            kept, is_cut = replace(kept, history=_without_oldest_turn(kept.history)), True

    def encode(self, example: Example) -> EncodedExample:
        """Returns prompt + response + eos, both cut to bounds; only a cut response loses eos."""
        prompt_ids, is_prompt_cut = self.encode_prompt(example)
        response_ids = [*self._ids(example.references[0]), int(self.tokenizer.eos_token_id)]  # type: ignore[arg-type]
        room = self.max_tokens - len(prompt_ids)
        return EncodedExample(
            example_id=example.example_id,
            token_ids=(*prompt_ids, *response_ids[:room]),
            num_prompt_tokens=len(prompt_ids),
            is_prompt_cut=is_prompt_cut,
            is_response_cut=len(response_ids) > room,
        )


def render_plain(template: str, example: Example) -> Prompt:
    """Returns the prompt of an example under a template that needs no tokenizer: not `chat`."""
    instruction = "\n\n".join([*(text for _, text in example.history), example.prompt])
    content = f"{instruction}\n{example.context}" if example.context else instruction
    if template == "short":
        return Prompt("### Instruction:\n", content, "\n\n### Response:\n")
    if template == "alpaca":
        head = _ALPACA.format(more=_WITH_CONTEXT if example.context else "") + "### Instruction:\n"
        if example.context:
            content = f"{instruction}\n\n### Input:\n{example.context}"
        return Prompt(head, content, "\n\n### Response:\n")
    before, _, after = template.partition("{prompt}")
    return Prompt(before, content, after)


def chat_messages(example: Example) -> list[dict[str, str]]:
    """Returns an example's messages up to the question, as a chat template takes them."""
    content = f"{example.prompt}\n{example.context}" if example.context else example.prompt
    messages = [{"role": role, "content": text} for role, text in example.history]
    return [*messages, {"role": "user", "content": content.strip()}]


def _without_oldest_turn(history: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Returns the messages without the oldest question and answer; a system message goes last."""
    first = 1 if history[0][0] == "system" and len(history) > 1 else 0
    later_questions = [
        index for index, (role, _) in enumerate(history) if role == "user" and index > first
    ]
    return history[:first] + history[later_questions[0] if later_questions else len(history) :]


def shift_labels(token_ids: Sequence[int], num_prompt_tokens: int) -> tuple[list[int], list[int]]:
    """Returns (inputs, labels), both one shorter than `token_ids`; prompt labels are ignored."""
    labels = [IGNORE_INDEX] * (num_prompt_tokens - 1) + list(token_ids[num_prompt_tokens:])
    return list(token_ids[:-1]), labels


def collate(examples: Sequence[EncodedExample], pad_id: int) -> Batch:
    """Returns one row per example, padded on the right; without any, one row of one masked token.

    The dummy lets a rank without rows take part in every forward, backward
    and gather of the others.
    """
    return replace(
        collate_packed([[example] for example in examples], pad_id), position_ids_BT=None
    )


def collate_packed(rows: Sequence[Sequence[EncodedExample]], pad_id: int) -> Batch:
    """Returns rows that hold several examples end to end, padded on the right.

    Positions start from 0 with every example, and with the padding: that is how transformers tells
    that one must not attend to another.
    """
    import torch

    if not rows:
        one = torch.tensor([[pad_id]])
        zero = torch.zeros_like(one)
        return Batch(one, zero + 1, zero + IGNORE_INDEX, num_tokens=0, position_ids_BT=zero)
    lengths = torch.tensor([sum(len(item.token_ids) - 1 for item in row) for row in rows])
    longest = int(lengths.max())
    input_ids, labels, positions = [], [], []
    for row, length in zip(rows, lengths.tolist(), strict=True):
        pairs = [shift_labels(item.token_ids, item.num_prompt_tokens) for item in row]
        rest = longest - length
        input_ids.append([token for inputs, _ in pairs for token in inputs] + [pad_id] * rest)
        labels.append([label for _, found in pairs for label in found] + [IGNORE_INDEX] * rest)
        starts = [range(len(inputs)) for inputs, _ in pairs] + [range(rest)]
        positions.append([position for start in starts for position in start])
    return Batch(
        torch.tensor(input_ids),
        (torch.arange(longest)[None, :] < lengths[:, None]).long(),
        torch.tensor(labels),
        num_tokens=int(lengths.sum()),
        example_ids=tuple(item.example_id for row in rows for item in row),
        position_ids_BT=torch.tensor(positions),
    )


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the padding id, else eos (masked by position, so it does not matter)."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)  # type: ignore[arg-type]
