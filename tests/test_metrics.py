"""ROUGE-L and exact match: against a plain LCS, and the cases in which published codes differ."""

from __future__ import annotations

import random

import pytest

from pocl_dist.metrics import exact_match, normalise_answer, rouge_l, score_answers

SHORT_WORDS = [
    "a",
    "b",
    "c",
    "d",
    "e",
]  # no longer than three letters: the stemmer leaves them alone


def lcs_length(first: list[str], second: list[str]) -> int:
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return 1 + lcs_length(first[:-1], second[:-1])
    return max(lcs_length(first[:-1], second), lcs_length(first, second[:-1]))


def lcs_f1(answer: str, reference: str) -> float:
    common = lcs_length(answer.split(), reference.split())
    if not common:
        return 0.0
    precision, recall = common / len(answer.split()), common / len(reference.split())
    return 2 * precision * recall / (precision + recall)


def random_text(generator: random.Random) -> str:
    return " ".join(generator.choices(SHORT_WORDS, k=generator.randint(1, 7)))


@pytest.mark.parametrize("seed", range(20))
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(seed: int) -> None:
    generator = random.Random(seed)
    answer, references = random_text(generator), [random_text(generator) for _ in range(3)]
    expected = max(lcs_f1(answer, reference) for reference in references)
    assert rouge_l(answer, references) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_stems_words_and_ignores_case_and_punctuation() -> None:
    assert rouge_l("The CATS were running!", ["the cat were run"]) == 1.0


@pytest.mark.parametrize("answer", ["", " \n", "!?"])
def test_an_empty_answer_scores_zero(answer: str) -> None:
    assert rouge_l(answer, ["yes", "no"]) == 0.0
    assert exact_match(answer, ["yes", "no"]) == 0.0


def test_an_empty_answer_does_not_match_a_reference_of_punctuation() -> None:
    assert exact_match("", ["..."]) == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "is_match"),
    [
        ("The  answer\nis 4.", "the answer is 4", True),
        ("U.S.A.", "usa", True),
        ("4 apples", "four apples", False),
        ("an apple", "apple", False),  # articles count, unlike in SQuAD
    ],
)
def test_exact_match_forgives_case_punctuation_and_spaces_only(
    answer: str, reference: str, is_match: bool
) -> None:
    assert exact_match(answer, ["something else", reference]) == float(is_match)
    assert (normalise_answer(answer) == normalise_answer(reference)) is is_match


def test_a_summary_is_the_mean_in_percent() -> None:
    summary = score_answers(["a b", "c", ""], [["a b"], ["d", "c d"], ["e"]])
    assert summary.rouge_l == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)
    assert summary.exact_match == pytest.approx(100 / 3)
    assert summary.num_examples == 3
