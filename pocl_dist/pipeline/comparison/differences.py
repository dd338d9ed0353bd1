"""What an arm gains over another: KD + POCL over plain KD, controls over both. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pocl_dist.pipeline.comparison.intervals import bootstrap, spread
from pocl_dist.pipeline.comparison.rounds import Comparison
from pocl_dist.pipeline.comparison.scores import METRICS, ScoresOfArm, columns_of, paired


def _pairs(comparison: Comparison) -> list[tuple[str, str]]:
    """Returns (arm, the arm it is compared with), each once."""
    by_name = {arm.name: arm for arm in comparison.arms}
    pairs = [(f"{arm.method}-pocl", arm.name) for arm in comparison.arms if arm.kind == "kd"]
    for row in comparison.ablations:
        plain, pocl = f"{row.method}-kd", f"{row.method}-pocl"
        pairs += [(row.arm, plain), (pocl, row.arm)]
    return [(a, b) for a, b in dict.fromkeys(pairs) if a != b and a in by_name and b in by_name]


def differences(
    comparison: Comparison, scores: Mapping[str, ScoresOfArm], sets: Sequence[str]
) -> list[dict[str, object]]:
    """Returns a row per pair of arms, column of the table and metric."""
    rows = []
    for arm, against in _pairs(comparison):
        for column, names in columns_of(sets).items():
            for metric in METRICS:
                found = _difference(scores[arm], scores[against], names, metric)
                rows.append(
                    {
                        "arm": arm,
                        "against": against,
                        "test_set": column,
                        "metric": metric,
                        **found,
                        "is_complete": found["num_seeds"] == len(comparison.seeds),
                    }
                )
    return rows


def _difference(
    ours: ScoresOfArm, theirs: ScoresOfArm, names: Sequence[str], metric: str
) -> dict[str, object]:
    """Returns mean, standard deviation over seeds and interval of ours minus theirs."""
    of_sets = []
    seeds: list[int] = []
    for name in names:
        seeds, rows = paired(
            {seed: of_set[name] for seed, of_set in ours.items()},
            {seed: of_set[name] for seed, of_set in theirs.items()},
            metric,
        )
        of_sets.append(rows)
    if not seeds:
        return {"mean": None, "std": None, "low": None, "high": None, "by_seed": {}, "num_seeds": 0}
    by_seed = {
        seed: sum(float(rows[index].mean()) for rows in of_sets) / len(of_sets)
        for index, seed in enumerate(seeds)
    }
    over_seeds, interval = spread(list(by_seed.values())), bootstrap(of_sets)
    return {
        "mean": over_seeds.mean,
        "std": over_seeds.std,
        "low": interval.low,
        "high": interval.high,
        "by_seed": {str(seed): value for seed, value in by_seed.items()},
        "num_seeds": len(seeds),
    }
