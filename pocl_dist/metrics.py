"""ROUGE-L and exact match, computed as the published evaluation of this benchmark family does.

ROUGE-L: `rouge_score` with Porter stemming, F1, the best over the references. Exact match: equal
after lower-casing, without punctuation and with single spaces (MiniLLM, DistiLLM). An item scores
0..1; a summary is in percent, unrounded. An empty answer scores 0 in both.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from pocl_dist.records import JSONRecord

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class ScoreSummary(JSONRecord):
    """Means over a set of answers, in percent."""

    rouge_l: float
    exact_match: float
    num_examples: int


@cache
def _scorer() -> RougeScorer:
    # Not at module level: it imports nltk (0.3 s), which `--help` has no use for.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Returns the ROUGE-L F1 of an answer, 0..1, best over its references."""
    return max(
        float(_scorer().score(reference, answer)["rougeL"].fmeasure) for reference in references
    )


def normalise_answer(text: str) -> str:
    """Returns the text in lower case, without ASCII punctuation, with single spaces."""
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Returns 1.0 when the normalised answer equals a normalised reference, else 0.0."""
    if not answer.strip():
        return 0.0
    normalised = normalise_answer(answer)
    return float(any(normalised == normalise_answer(reference) for reference in references))


def score_answers(answers: Sequence[str], references: Sequence[Sequence[str]]) -> ScoreSummary:
    """Returns the means over answers and their references, which stand in the same order."""
    pairs = list(zip(answers, references, strict=True))
    return summarise([rouge_l(*pair) for pair in pairs], [exact_match(*pair) for pair in pairs])


def summarise(rouge_ls: Sequence[float], exact_matches: Sequence[float]) -> ScoreSummary:
    """Returns the means of per-item scores, in percent."""
    num_examples = len(rouge_ls)
    return ScoreSummary(
        rouge_l=100 * math.fsum(rouge_ls) / num_examples,
        exact_match=100 * math.fsum(exact_matches) / num_examples,
        num_examples=num_examples,
    )
