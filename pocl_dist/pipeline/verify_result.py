"""The later links of the chain: checkpoints -> export -> eval -> report.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from pocl_dist.config.steps import needs_difficulty
from pocl_dist.files import JSONValue
from pocl_dist.models.sources import MARKER, ModelFolder, model_digest
from pocl_dist.pipeline import evaluate
from pocl_dist.pipeline.harness import config_inputs
from pocl_dist.pipeline.inputs import result_inputs
from pocl_dist.pipeline.plan_files import plan_digest, read_plan
from pocl_dist.pipeline.report_numbers import results
from pocl_dist.pipeline.verify_records import Chain, Record, differing, same

# The same as in distributed.checkpoint, which loads torch.
CHECKPOINT_MANIFEST = "MANIFEST.json"
CHECKPOINT_SEAL = "MANIFEST.json.sha256"


def checkpoints(chain: Chain) -> Iterator[str]:
    """What was trained on: config, plan, rows, models."""
    name = "checkpoints/inputs.json"
    record = chain.record(name)
    if record:
        yield from differing(name, record, result_inputs(chain.config), "config.yaml")
        if record.get("digest.plan") != plan_digest(read_plan(chain.run.plan)):
            yield f"{name}: digest.plan is not that of plan.json"
        inputs = cast("Record", chain.record("plan.json")["inputs"])
        yield same(name, "digest.data", record, "plan.json", "data.train sha256", inputs)
        if needs_difficulty(chain.config):
            source, key = "difficulty/inputs.json", "models.student model sha256"
            yield same(name, "digest.student", record, source, key, chain.record(source))
        if chain.config.teacher.source.startswith("cache_"):
            source, key = "teacher_cache/inputs.json", "models.teacher model sha256"
            yield same(name, "digest.teacher", record, source, key, chain.record(source))


def checkpoint_files(chain: Chain) -> Iterator[str]:
    """Every checkpoint; one that was set aside (`bad-...`) is known to be damaged."""
    folders = {name.split("/")[1] for name in chain.names("checkpoints/step-")}
    for folder in sorted(folders):
        yield from _checkpoint(chain, f"checkpoints/{folder}")


def _checkpoint(chain: Chain, folder: str) -> Iterator[str]:
    """A checkpoint against its own manifest, seal, and the record of the run."""
    manifest = f"{folder}/{CHECKPOINT_MANIFEST}"
    if manifest not in chain.sha256:
        yield f"{manifest}: missing"
        return
    record = chain.record(manifest)
    rows = cast("list[dict[str, JSONValue]]", record["files"])
    listed = {f"{folder}/{row['path']}": row["sha256"] for row in rows}
    for name, sha256 in listed.items():
        if chain.sha256.get(name) != sha256:
            yield f"{name}: is not what {manifest} says"
    seal = f"{folder}/{CHECKPOINT_SEAL}"
    for name in chain.names(f"{folder}/"):
        if name not in listed and name not in (manifest, seal):
            yield f"{name}: not listed in {manifest}"
    if seal in chain.sha256:
        expected = f"{chain.sha256[manifest]}  {CHECKPOINT_MANIFEST}\n".encode()
        if (chain.run.root / seal).read_bytes() != expected:
            yield f"{manifest}: does not match {seal}"
    inputs = chain.record("checkpoints/inputs.json")
    digests = cast("Record", record.get("digests") or {})
    for key in ("data", "plan", "student", "teacher", "tokenizer"):
        if key in digests and inputs:
            yield same(manifest, key, digests, "inputs.json", f"digest.{key}", inputs)
    if folder != f"checkpoints/step-{int(cast('int', record['step'])):08d}":
        yield f"{manifest}: is of step {record['step']}"


def init_student(chain: Chain) -> Iterator[str]:
    """The student that was cut from the teacher."""
    training, cut = chain.record("checkpoints/inputs.json"), f"init_student/{MARKER}"
    if cut in chain.sha256 and chain.config.models.student.init_layers is not None:
        made = chain.record(cut)
        yield same(cut, "digest.teacher", made, "checkpoints", "digest.teacher", training)
        found = {"digest": model_digest(ModelFolder(chain.run.init_student, "init_student"))}
        yield same("init_student", "digest", found, "checkpoints", "digest.student", training)


def export(chain: Chain) -> Iterator[str]:
    """What the export was made from."""
    training, export = chain.record("checkpoints/inputs.json"), f"export/{MARKER}"
    if export not in chain.sha256:
        return
    record = chain.record(export)
    yield from differing(export, record, result_inputs(chain.config), "config.yaml")
    if record.get("plan sha256") != chain.sha256.get("plan.json"):
        yield f"{export}: was made from another plan.json"
    for key in ("digest.student", "digest.teacher"):
        yield same(export, key, record, "checkpoints/inputs.json", key, training)


def eval(chain: Chain) -> Iterator[str]:
    """Answers and reports: of this export, and of the models that training had."""
    reports = chain.names("eval/", "/report.json")
    inputs = [name for name in chain.names("eval/", ".json") if "/inputs" in name]
    if not reports and not inputs:
        return
    student = model_digest(ModelFolder(chain.run.export, "export"))
    training = chain.record("checkpoints/inputs.json")
    of_model = {
        "student model sha256": student,
        "teacher model sha256": training.get("digest.teacher"),
        "student_before model sha256": training.get("digest.student"),
    }
    for name in inputs:
        record = chain.record(name)
        expected = evaluate.config_keys(chain.config)
        expected |= {key: value for key, value in of_model.items() if key in record}
        yield from differing(name, record, expected, "config.yaml, or of the model, ")
    for name in reports:
        if chain.record(name).get("model") != student:
            yield f"{name}: is of another model than export/"


def harness(chain: Chain) -> Iterator[str]:
    """Figures of the harness: of this export, and of this config."""
    for name in chain.names("eval/harness/task-", ".json"):
        expected = config_inputs(chain.config)
        expected["model"] = model_digest(ModelFolder(chain.run.export, "export"))
        yield from differing(name, chain.record(name), expected, "config.yaml, or of the model, ")


def report(chain: Chain) -> Iterator[str]:
    """The figures of report.json are those of the files that it sums up."""
    record = chain.record("report.json")
    if not record:
        return
    expected = results(chain.run)
    evals, theirs = (cast("Record", value["eval"]) for value in (record, expected))
    stale = [name for name in evals if evals[name] != theirs.get(name)]
    if record.get("harness", {}) != expected.get("harness", {}):
        yield "report.json: is not about eval/harness/ as it is; run `pocl-dist report`"
    if any(record[key] != expected[key] for key in ("stages", "quarters") if key in record):
        yield "report.json: is not about metrics.jsonl as it is; run `pocl-dist report`"
    for name in stale:
        yield f"report.json: is not about eval/{name}/report.json as it is; run `pocl-dist report`"
