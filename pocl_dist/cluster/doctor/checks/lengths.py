"""The rows in tokens: what the template makes of them, how long they are, how many are cut."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from pocl_dist.cluster.doctor.case import Case, Lengths
from pocl_dist.cluster.doctor.finding import SEE_ABOVE, Finding, SkipError, ok, warning
from pocl_dist.config import Config
from pocl_dist.data.encoding import Encoder
from pocl_dist.models.plain_tokenizer import PlainTokenizer
from pocl_dist.records import EncodedExample, Example

NUM_ENCODED = 1000
"""Rows of each source that are tokenised, drawn from all that were read."""
MANY = 0.05
"""A larger share of cut rows is worth a warning."""
_UNBOUNDED = 1 << 40


def template(case: Case) -> Iterator[Finding]:
    """Renders one row: template, eos and the room that the template leaves."""
    tokenizer = case.tokenizer(case.trained_role)
    encoder = _encoder(case.config, tokenizer)
    train = case.rows.get("data.train")
    if train is None:
        raise SkipError(f"the rows of data.train could not be read {SEE_ABOVE}")
    ids, _ = encoder.encode_prompt(train.examples[0])
    case.encoders.append(encoder)
    eos = tokenizer.special_tokens.get("eos_token")
    name = case.config.data.template
    kind = name if "{prompt}" not in name else "own text"
    yield ok(
        f"template {kind!r}; the first prompt has {len(ids)} tokens; "
        f"answers end with {eos!r} (id {tokenizer.eos_token_id})"
    )


def lengths(case: Case) -> Iterator[Finding]:
    """Tokenises a sample of every source and tells how long its rows are and how many are cut."""
    if not case.encoders:
        raise SkipError(f"the template could not be used {SEE_ABOVE}")
    encoder, tokenizer = case.encoders[0], case.tokenizer(case.trained_role)
    whole = Encoder(tokenizer, case.config.data.template, _UNBOUNDED, _UNBOUNDED)
    for key, rows in case.rows.items():
        chosen = _spread(rows.examples, NUM_ENCODED)
        encoded = [encoder.encode(example) for example in chosen]
        labels = sum(item.num_response_tokens for item in encoded) / len(encoded)
        case.lengths[key] = Lengths(len(chosen), labels)
        yield from _lengths(case.config, key, encoded, [whole.encode(e) for e in chosen])


def _encoder(config: Config, tokenizer: PlainTokenizer) -> Encoder:
    data = config.data
    return Encoder(tokenizer, data.template, data.max_tokens, data.max_prompt_tokens)


def _spread(examples: Sequence[Example], count: int) -> Sequence[Example]:
    """Returns up to `count` of the examples, the same ones each time: files are often sorted."""
    if len(examples) <= count:
        return examples
    return [examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), count))]


def _lengths(
    config: Config, key: str, encoded: Sequence[EncodedExample], whole: Sequence[EncodedExample]
) -> Iterator[Finding]:
    data, num = config.data, len(encoded)
    prompts = sorted(item.num_prompt_tokens for item in whole)
    answers = sorted(item.num_response_tokens for item in whole)
    cut_prompts = sum(item.is_prompt_cut for item in encoded) / num
    is_learnt = key == "data.train"  # the others' answers are compared as text, uncut
    cut_answers = is_learnt * sum(item.is_response_cut for item in encoded) / num
    told = f", {cut_answers:.1%} of answers" if is_learnt else ""
    line = (
        f"{key}: prompts {_quantiles(prompts)}, answers {_quantiles(answers)} tokens "
        f"(half, 95 %, all are within); cut: {cut_prompts:.1%} of prompts{told} ({num} rows)"
    )
    if cut_prompts <= MANY and cut_answers <= MANY:
        yield ok(line)
        return
    hints = []
    if cut_prompts > MANY:
        hints.append(f"data.max_prompt_tokens {_at(prompts, 0.99)} (now {data.max_prompt_tokens})")
    if cut_answers > MANY:
        totals = sorted(len(item.token_ids) for item in whole)
        hints.append(f"data.max_tokens {_at(totals, 0.99)} (now {data.max_tokens})")
    yield warning(
        line,
        "A prompt that is cut loses its beginning; an answer that is cut never learns to end.",
        f"99 % of the rows fit with {' and '.join(hints)}",
    )


def _at(ordered: Sequence[int], share: float) -> int:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _quantiles(ordered: Sequence[int]) -> str:
    return f"{_at(ordered, 0.5)}/{_at(ordered, 0.95)}/{ordered[-1]}"
