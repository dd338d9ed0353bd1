"""What each stage of the curriculum costs, with the teacher online and from its cache; disk."""

from __future__ import annotations

from dataclasses import dataclass

from pocl_dist.cluster.estimate.flops import step_work
from pocl_dist.cluster.estimate.passes import PassTime, cache_pass
from pocl_dist.cluster.estimate.setup import Setup
from pocl_dist.cluster.estimate.step_time import step_time
from pocl_dist.data.sampler import num_visits
from pocl_dist.distributed.zero_bytes import OPTIMIZER_BYTES

ONLINE, HIDDEN, TOP_K = "online", "cache_hidden", "cache_topk"


@dataclass(frozen=True)
class StageCost:
    """One stage on all devices. Hours are device-hours, by teacher source; 0 tokens are padding."""

    index: int
    num_examples: int
    num_steps: int
    num_tokens: float  # that go in, without padding
    flops: float
    seconds: float  # as configured
    device_hours: dict[str, float]  # teacher source -> hours; SFT has one entry


@dataclass(frozen=True)
class Disk:
    """Bytes of the run directory that grow with model and data."""

    checkpoints: int
    export: int
    cache: dict[str, int]  # teacher source -> bytes


def sources_of(setup: Setup) -> tuple[str, ...]:
    """Returns the teacher sources that can be compared."""
    if not setup.has_teacher:
        return (ONLINE,)
    return (ONLINE,) if setup.config.policy.mode != "off" else (ONLINE, HIDDEN, TOP_K)


def stage_costs(setup: Setup) -> tuple[StageCost, ...]:
    """Returns the stages of the plan with their costs; steps are those that `plan` makes."""
    seconds = {s: step_time(setup.with_teacher(source=s)).total for s in sources_of(setup)}
    own = step_time(setup).total
    flops = step_work(setup, setup.layout).flops * setup.world_size
    costs = []
    for stage in setup.stages:
        visits = num_visits(stage.num_examples, stage.epochs)
        share = visits / setup.config.engine.global_batch_size  # the last step is smaller
        hours = {s: t * stage.num_steps * setup.world_size / 3600 for s, t in seconds.items()}
        costs.append(
            StageCost(
                index=stage.index,
                num_examples=stage.num_examples,
                num_steps=stage.num_steps,
                num_tokens=visits * setup.workload.tokens_per_row,
                flops=share * flops,
                seconds=own * stage.num_steps,
                device_hours=hours,
            )
        )
    return tuple(costs)


def cache_passes(setup: Setup) -> dict[str, PassTime]:
    """Returns {teacher source: the pass that fills its cache}."""
    found = {}
    for source in sources_of(setup)[1:]:
        done = cache_pass(setup.with_teacher(source=source))
        if done is not None:
            found[source] = done
    return found


def disk(setup: Setup) -> Disk:
    """Returns what checkpoints, export and cache take.

    A checkpoint holds weights and two moments in fp32; one more than `keep_last` while it is
    written, one per stage with `keep_stage_ends`.
    """
    config, s = setup.config, setup.dtype_bytes
    kept = config.checkpoint.keep_last + 1
    if config.checkpoint.keep_stage_ends:
        kept += config.curriculum.num_stages
    cache: dict[str, int] = {}
    if setup.has_teacher:
        assert setup.teacher is not None
        labels = setup.workload.num_rows * setup.workload.labels_per_row
        top_k = min(config.teacher.top_k, setup.vocabulary)
        cache = {
            HIDDEN: int(labels * setup.teacher.head_hidden * s) + s * setup.teacher.head_parameters,
            TOP_K: int(labels * (8 * top_k + 4)),
        }
    return Disk(
        checkpoints=kept * OPTIMIZER_BYTES * setup.num_trained,
        export=s * setup.student.num_parameters,
        cache=cache,
    )
