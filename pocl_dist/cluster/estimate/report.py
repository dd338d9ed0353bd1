"""An estimate as text: plain tables, the same on every terminal and in documents."""

from __future__ import annotations

from collections.abc import Sequence

from pocl_dist.cluster.estimate.estimate import Estimate
from pocl_dist.cluster.estimate.memory import PARTS

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(num_bytes: float) -> str:
    """Returns bytes with a binary unit and three figures."""
    value, unit = float(num_bytes), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def number(value: float) -> str:
    """Returns a count or a rate with a decimal suffix."""
    for suffix in ("", " k", " M", " G", " T", " P", " E", " Z"):
        if abs(value) < 1000:
            return f"{value:.3g}{suffix}"
        value /= 1000
    return f"{value:.3g} Y"


def duration(seconds: float) -> str:
    """Returns seconds as a person would say them."""
    for limit, unit, name in (
        (1, 1e-3, "ms"),
        (120, 1, "s"),
        (7200, 60, "min"),
        (172800, 3600, "h"),
    ):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} days"


def hours_text(hours: float) -> str:
    """Returns device-hours with three figures, or all before the point."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns aligned columns, the first on the left."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def report(found: Estimate) -> str:
    """Returns all tables of an estimate."""
    parts = [_head(found), _memory(found), _step(found), _stages(found), _disk(found)]
    parts += [_suggestion(found), _what_if(found), _notes(found)]
    return "\n\n".join(parts)


def _head(found: Estimate) -> str:
    setup, work = found.setup, found.setup.workload
    teacher = (
        "none (SFT)"
        if setup.teacher is None
        else (f"{number(setup.teacher.num_parameters)} parameters, {setup.config.teacher.source}")
    )
    trained = (
        "" if setup.config.models.student.lora is None else f", {number(setup.num_trained)} trained"
    )
    tokens = work.num_rows * work.tokens_per_row
    return "\n".join(
        [
            f"{setup.cluster.num_nodes} node(s) x {setup.cluster.devices_per_node} "
            f"{setup.device.name} = {setup.world_size} rank(s), {setup.dtype}, ZeRO "
            f"{setup.zero_stage}",
            f"teacher  {teacher}",
            f"student  {number(setup.student.num_parameters)} parameters{trained}",
            f"rows     {work.num_rows:,} of {work.tokens_per_row:.0f} tokens, "
            f"{work.labels_per_row:.0f} of them learnt: {number(tokens)} tokens",
        ]
    )


def _memory(found: Estimate) -> str:
    phases = [*found.phases, *found.passes]
    rows = []
    for part in PARTS:
        held = [phase.parts.get(part, 0) for phase in phases]
        if any(held):
            rows.append([part, *(size(count) if count else "" for count in held)])
    rows.append(["total", *(size(phase.total) for phase in phases)])
    if any(phase.host for phase in phases):
        rows.append(["in host memory", *(size(p.host_total) if p.host else "" for p in phases)])
    usable = found.setup.device.usable_bytes
    verdict = "fits" if found.is_fitting else "DOES NOT FIT"
    title = (
        f"memory of a rank: {verdict}; {size(usable)} of {size(found.setup.device.memory_bytes)} "
        f"can be used"
    )
    too_large = [phase.name for phase in found.passes if phase.total > usable]
    lines = [title, table(["part", *(phase.name for phase in phases)], rows)]
    if too_large:
        lines.append(f"too large for a device: {', '.join(too_large)} (teacher.devices_per_actor, "
                     "teacher.cache_engine: zero3, generation.batch_size)")  # fmt: skip
    return "\n".join(lines)


def _step(found: Estimate) -> str:
    layout, step = found.layout, found.step
    rows = [
        ["teacher", duration(step.teacher)],
        ["student", duration(step.student)],
        ["loss", duration(step.loss)],
        ["communication", duration(step.communication)],
        ["update", duration(step.update)],
        ["overhead", duration(step.overhead)],
        ["step", duration(step.total)],
    ]
    setup = found.setup
    tokens = setup.config.engine.global_batch_size * setup.workload.tokens_per_row / step.total
    peak = setup.device.flops[setup.dtype] * setup.world_size
    share = found.step_flops / step.total / peak
    return "\n".join(
        [
            f"a step: {layout.num_micro_batches:.3g} micro-batch(es) of a rank, "
            f"{layout.num_tokens:.0f} tokens with padding, {number(found.step_flops)}FLOP in all",
            table(["part", "time"], rows),
            f"{number(tokens)} tokens/s, {share:.0%} of the devices' "
            f"{number(setup.device.flops[setup.dtype])}FLOP/s",
        ]
    )


def _stages(found: Estimate) -> str:
    sources = list(found.stages[0].device_hours)
    header = ["", "rows", "steps", "tokens", "FLOP", "time"]
    header += [f"GPU-hours, {source}" for source in sources]
    rows, totals = [], dict.fromkeys(sources, 0.0)
    if found.measure is not None:
        done = found.measure
        rows.append(_pass_row("measure", found, done.flops, done.seconds,
                              dict.fromkeys(sources, done.device_hours)))  # fmt: skip
        totals = {source: totals[source] + done.device_hours for source in sources}
    if found.caches:
        hours = {source: done.device_hours for source, done in found.caches.items()}
        own = found.caches.get(found.setup.config.teacher.source)
        seconds = None if own is None else own.seconds
        flops = next(iter(found.caches.values())).flops
        rows.append(_pass_row("cache", found, flops, seconds, hours))
        totals = {source: totals[source] + hours.get(source, 0.0) for source in sources}
    for stage in found.stages:
        rows.append(
            [
                f"stage {stage.index + 1}",
                f"{stage.num_examples:,}",
                f"{stage.num_steps:,}",
                number(stage.num_tokens),
                number(stage.flops),
                duration(stage.seconds),
                *(hours_text(stage.device_hours[source]) for source in sources),
            ]
        )
        totals = {source: totals[source] + stage.device_hours[source] for source in sources}
    steps = sum(stage.num_steps for stage in found.stages)
    rows.append(["total", "", f"{steps:,}", "", "", "", *(hours_text(totals[s]) for s in sources)])
    return "\n".join(["the run", table(header, rows)])


def _pass_row(
    name: str, found: Estimate, flops: float, seconds: float | None, hours: dict[str, float]
) -> list[str]:
    sources = found.stages[0].device_hours
    return [
        name,
        f"{found.setup.workload.num_rows:,}",
        "",
        "",
        number(flops),
        "" if seconds is None else duration(seconds),
        *(hours_text(hours[source]) if source in hours else "" for source in sources),
    ]


def _disk(found: Estimate) -> str:
    disk = found.disk
    caches = "".join(f", {source} {size(count)}" for source, count in disk.cache.items())
    return (
        f"disk: checkpoints {size(disk.checkpoints)} (keep_last and the one being written), "
        f"export {size(disk.export)}{caches}"
    )


def _suggestion(found: Estimate) -> str:
    if found.suggestion is None:
        return "no ZeRO stage, offload or micro-batch fits these devices"
    fit = found.suggestion
    return (
        f"quickest way that fits: {fit}\n"
        f"  {size(fit.peak_bytes)} per rank, {duration(fit.step_seconds)} a step"
    )


def _what_if(found: Estimate) -> str:
    rows = []
    for row in found.what_if:
        if row.peak_bytes is None or row.step_seconds is None or row.hours is None:
            rows.append([str(row.world_size), str(row.num_nodes), *[""] * 6, row.reason])
            continue
        rows.append(
            [
                str(row.world_size),
                str(row.num_nodes),
                size(row.peak_bytes),
                duration(row.step_seconds),
                f"{row.communication_share or 0:.0%}",
                duration(3600 * row.hours),
                hours_text(row.device_hours or 0.0),
                "" if row.efficiency is None else f"{row.efficiency:.0%}",
                row.reason,
            ]
        )
    header = ["devices", "nodes", "memory", "step", "comm.", "distill", "GPU-hours", "eff.", ""]
    return "\n".join(
        ["what if: the same config and global batch on other numbers of devices",
         table(header, rows)]
    )  # fmt: skip


def _notes(found: Estimate) -> str:
    return "\n".join(f"- {note}" for note in found.notes)
