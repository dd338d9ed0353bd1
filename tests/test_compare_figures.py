"""Learning rates, intervals and the table of a comparison, against figures computed by hand."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

import numpy as np
import pytest

from pocl_dist.config import replaced
from pocl_dist.errors import DataError
from pocl_dist.pipeline.comparison.intervals import bootstrap, spread
from pocl_dist.pipeline.comparison.rates import Candidate, choose, dev_of
from pocl_dist.pipeline.comparison.request import CompareRequest
from pocl_dist.pipeline.comparison.scores import SetScores, paired
from pocl_dist.pipeline.comparison.state import RunLook
from pocl_dist.pipeline.comparison.tables import html, markdown, titled_tables
from pocl_dist.pipeline.comparison.tabulate import tabulate
from tests.comparing import (
    answer_run,
    base_config,
    chosen,
    comparison_of,
    make_shared_files,
    train_run,
)

DONE, DIVERGED = RunLook("done"), RunLook("failed", "not finite", 76)

# -------------------------------------------------------------------------------- learning rates


def candidates(*devs: float | None) -> list[Candidate]:
    return [
        Candidate(10.0**-index, DIVERGED if dev is None else DONE, dev)
        for index, dev in enumerate(devs)
    ]


@pytest.mark.parametrize(
    ("devs", "is_higher_better", "expected"),
    [
        ((20.0, 30.0, 25.0), True, 1e-1),
        ((2.0, 3.0, 2.5), False, 1.0),
        ((30.0, 30.0, 25.0), True, 1e-1),  # equal: the smaller rate
        ((2.0, 2.0, 2.0), False, 1e-2),
        ((None, 10.0, 5.0), True, 1e-1),  # diverged: no candidate
        ((None, None), True, None),
        ((None,), True, 1.0),  # a grid of one is no choice
    ],
)
def test_the_best_dev_metric_chooses_and_equal_ones_take_the_smaller_rate(
    devs: tuple[float | None, ...], is_higher_better: bool, expected: float | None
) -> None:
    assert choose(candidates(*devs), is_higher_better) == expected
    assert choose(candidates(*devs)[::-1], is_higher_better) == expected


@pytest.mark.parametrize(("select", "expected"), [("last", 12.0), ("best_dev", 20.0)])
def test_the_dev_metric_of_a_run_is_that_of_the_exported_weights(
    tmp_path: Path, select: str, expected: float
) -> None:
    base = replaced(base_config(tmp_path), {"export.select": select})
    make_shared_files(base)
    comparison = comparison_of(base, CompareRequest(("forward_kl",), (1,)))
    compared = chosen(comparison, "sft", 1)
    train_run(comparison, compared, dev=(3.0, 20.0, 12.0))
    assert dev_of(compared) == expected


def test_each_arm_takes_its_own_rate_and_test_scores_do_not_matter(tmp_path: Path) -> None:
    base = base_config(tmp_path)
    make_shared_files(base)
    comparison = comparison_of(base, CompareRequest(("forward_kl",), (1, 2), (1e-3, 1e-2)))
    best = {"sft": 1e-2, "seqkd": 1e-3, "forward_kl-kd": 1e-2, "forward_kl-pocl": 1e-3}
    for arm in comparison.arms:
        for rate in comparison.grid:
            assert comparison.chosen_rate(arm) is None  # not while one may still be trained
            is_best = rate == best[arm.name]
            test = {"test1": [0.0 if is_best else 1.0] * 4}
            compared = comparison.compared(arm, rate, 1)
            answer_run(comparison, compared, test, dev=(50.0 if is_best else 40.0,))
        assert comparison.chosen_rate(arm) == best[arm.name]
    rows = [run.key for run in comparison.chosen_runs((1, 2))]
    assert [(key.arm, key.learning_rate) for key in rows[::2]] == list(best.items())


# ------------------------------------------------------------------------------------- intervals


def test_mean_and_standard_deviation_are_those_of_a_sample() -> None:
    found = spread([1.0, 2.0, 4.0])
    assert (found.mean, found.num_seeds) == (pytest.approx(7 / 3), 3)
    assert found.std == pytest.approx(math.sqrt(7 / 3))
    assert spread([5.0]).std is None


def test_the_interval_repeats_and_a_constant_difference_has_no_width() -> None:
    values = np.random.default_rng(0).normal(size=(3, 40))
    assert bootstrap([values]) == bootstrap([values])
    assert bootstrap([values], seed=1) != bootstrap([values], seed=2)
    constant = bootstrap([np.full((2, 30), 1.5)])
    assert (constant.low, constant.high) == (1.5, 1.5)


def test_the_interval_has_the_width_of_theory() -> None:
    values = np.random.default_rng(1).normal(loc=2.0, scale=3.0, size=(1, 400))
    found = bootstrap([values])
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    two = bootstrap([values, values[:, ::-1]])  # the mean of two sets that are drawn apart
    assert two.high - two.low == pytest.approx((found.high - found.low) / math.sqrt(2), rel=0.05)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(400):
        found = bootstrap([generator.normal(size=(2, 60)) + 0.3], num_resamples=400)
        hits += found.low <= 0.3 <= found.high
    # Binomial(400, 0.95) has a standard deviation of 1.1 %; a percentile interval is narrow.
    assert 0.91 <= hits / 400 <= 0.98


def test_examples_are_drawn_for_all_seeds_at_once() -> None:
    row = np.random.default_rng(3).normal(size=50)
    joint = bootstrap([np.stack([row, -row])])
    assert (joint.low, joint.high) == (0.0, 0.0)


def test_scores_are_joined_by_example_not_by_place() -> None:
    def scores(**of_example: float) -> SetScores:
        return SetScores({"rouge_l": of_example, "exact_match": of_example})

    ours = {1: scores(a=1.0, b=2.0), 2: scores(a=3.0, b=3.0), 3: scores(a=0.0, b=0.0)}
    theirs = {2: scores(b=1.0, a=0.0), 1: scores(b=2.0, a=5.0)}
    seeds, differences = paired(ours, theirs, "rouge_l")
    assert (seeds, differences.tolist()) == ([1, 2], [[-4.0, 0.0], [3.0, 2.0]])
    with pytest.raises(DataError, match="seed 1: the arms were tested on other examples"):
        paired({1: scores(a=1.0)}, {1: scores(b=1.0)}, "rouge_l")


# ----------------------------------------------------------------------------------------- table


def test_the_table_has_the_figures_computed_by_hand(tmp_path: Path) -> None:
    base = base_config(tmp_path, num_sets=2)
    make_shared_files(base)
    request = CompareRequest(("forward_kl",), (1, 2))
    comparison = comparison_of(base, request)
    # ROUGE-L per example; test1 has 4 examples, test2 has 5.
    scores = {
        ("forward_kl-kd", 1): ([0.1, 0.2, 0.3, 0.4], [0.5] * 5),
        ("forward_kl-kd", 2): ([0.3, 0.4, 0.5, 0.6], [0.7] * 5),
        ("forward_kl-pocl", 1): ([0.2, 0.3, 0.4, 0.5], [0.4] * 5),
        ("forward_kl-pocl", 2): ([0.3, 0.4, 0.5, 0.6], [0.8] * 5),
    }
    for arm in comparison.arms:
        for seed in (1, 2):
            one, two = scores.get((arm.name, seed), ([0.0] * 4, [1.0] * 5))
            answer_run(comparison, chosen(comparison, arm.name, seed), {"test1": one, "test2": two})
    value = tabulate(comparison, request.to_json())
    assert value == tabulate(comparison, request.to_json())
    assert value["is_complete"] and value["marks"] == []
    arms = {row["name"]: row for row in value["arms"]}  # type: ignore[union-attr,index,call-overload]
    plain = arms["forward_kl-kd"]["results"]  # type: ignore[index,call-overload]
    assert plain["test1"]["rouge_l"]["mean"] == pytest.approx(35.0)  # (25 + 45) / 2
    assert plain["test1"]["rouge_l"]["std"] == pytest.approx(math.sqrt(200))  # 25, 45
    assert plain["average"]["rouge_l"]["mean"] == pytest.approx(47.5)  # 37.5 and 57.5
    assert plain["average"]["rouge_l"]["std"] == pytest.approx(math.sqrt(200))
    differences = {
        row["test_set"]: row
        for row in value["differences"]  # type: ignore[union-attr]
        if row["metric"] == "rouge_l"  # type: ignore[index,call-overload]
    }
    # test1: +10 for every example of seed 1, 0 for seed 2; test2: -10, +10; average: 0, +5.
    of_test1 = differences["test1"]  # type: ignore[index]
    assert (of_test1["mean"], of_test1["by_seed"]) == (
        pytest.approx(5.0),
        {"1": pytest.approx(10.0), "2": pytest.approx(0.0)},
    )
    assert of_test1["std"] == pytest.approx(math.sqrt(50))
    assert (of_test1["low"], of_test1["high"]) == (pytest.approx(5.0), pytest.approx(5.0))
    assert differences["test2"]["mean"] == pytest.approx(0.0)  # type: ignore[index]
    assert differences["average"]["mean"] == pytest.approx(2.5)  # type: ignore[index]
    text = markdown(value)
    assert (
        "| forward_kl | KD | 120 | 0.001 | 35.00 ± 14.14 | 60.00 ± 14.14 | 47.50 ± 14.14 |" in text
    )
    assert "|  | difference |  |  | +5.00 [+5.00, +5.00] | " in text
    assert "| teacher |  |  |  | 0.00 | 100.00 | 50.00 |" in text
    assert "## Missing" not in text
    page = html("compared", value)
    cells = [cell for table in titled_tables(value).values() for line in table for cell in line]
    assert "35.00 ± 14.14" in cells and all(escape(cell) in page for cell in cells)
    axis = page.partition('"differences_rouge_l":{"name":')[2]
    assert axis.startswith('["forward_kl-pocl − forward_kl-kd"],"value":[2.5')


def test_visits_of_both_arms_stand_in_the_table(tmp_path: Path) -> None:
    base = base_config(tmp_path)
    make_shared_files(base, num_without_score=2)
    request = CompareRequest(("forward_kl",), (1,))
    comparison = comparison_of(base, request)
    value = tabulate(comparison, request.to_json())
    arms = {row["name"]: row for row in value["arms"]}  # type: ignore[union-attr,index,call-overload]
    # 22 rows have scores: stages of 5, 10, 15, 22 rows, 110 / 52 epochs, every stage rounded up.
    by_hand = sum(math.ceil(n * 110 / 52) for n in (5, 10, 15, 22))
    assert value["target_visits"] == arms["forward_kl-pocl"]["visits"] == by_hand  # type: ignore
    assert arms["forward_kl-kd"]["visits"] == by_hand  # type: ignore[index,call-overload]
    assert (arms["forward_kl-kd"]["num_rows"], arms["forward_kl-pocl"]["num_rows"]) == (24, 22)  # type: ignore
