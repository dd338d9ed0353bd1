"""Tokenizers: readable, the same for teacher and student, a head row for every token."""

from __future__ import annotations

from collections.abc import Iterator

from pocl_dist.cluster.doctor.case import Case
from pocl_dist.cluster.doctor.checks.models import named_models
from pocl_dist.cluster.doctor.finding import SEE_ABOVE, Finding, error, ok, skipped
from pocl_dist.errors import PoclError
from pocl_dist.models.config_fit import check_top_k
from pocl_dist.models.plain_tokenizer import UnreadableTokenizerError, read_tokenizer
from pocl_dist.models.tokenizer_checks import check_head_rows, check_same_tokenizer


def tokenizers(case: Case) -> Iterator[Finding]:
    """Reads the tokenizers and compares vocabularies, eos and heads."""
    for role, _ in named_models(case.config):
        if role not in case.models:
            yield skipped(f"models.{role} could not be read {SEE_ABOVE}")
            continue
        model = case.models[role]
        key = f"models.{role}.path"
        try:
            tokenizer = read_tokenizer(model.located.path, key, model.header.model_type)
        except UnreadableTokenizerError as reason:
            yield skipped(str(reason), "save it again with transformers: a tokenizer.json is made")
            continue
        except PoclError as problem:  # the other one is read all the same
            yield error(problem.exit_code, str(problem))
            continue
        case.tokenizers[role] = tokenizer
        check_head_rows(model.header.vocabulary_rows, len(tokenizer), f"models.{role}")
    yield from _compared(case)


def _compared(case: Case) -> Iterator[Finding]:
    if set(case.tokenizers) == {"teacher", "student"}:
        check_same_tokenizer(case.tokenizers["teacher"], case.tokenizers["student"])
        same = "teacher and student share a tokenizer"
    elif case.trained_role in case.tokenizers:
        same = f"the {case.trained_role}'s tokenizer"
    else:
        return
    tokenizer = case.tokenizers[case.trained_role]
    check_top_k(case.config, len(tokenizer))
    rows = {
        role: model.header.vocabulary_rows
        for role, model in case.models.items()
        if model.header.vocabulary_rows is not None
    }
    padded = ", ".join(f"{role} has {count} rows" for role, count in rows.items())
    yield ok(f"{same}: {len(tokenizer)} tokens; {padded or 'rows of the heads unknown'}")
