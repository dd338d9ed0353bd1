"""The chain of a run: does each result belong to the one that it says it was made from?

config.yaml -> difficulty -> plan -> generated, teacher_cache -> checkpoints -> export -> eval ->
report.json. Every step wrote down what it was made from; here the records are held against one
another and against the files, by their digests. Who changes a file and seals the folder anew is
found here. Rows and models outside of the folder are not read again: the steps do that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pocl_dist.config import Config, load_config
from pocl_dist.data.sources import read_rows
from pocl_dist.errors import PoclError
from pocl_dist.files import JSONValue, digest_of, read_json
from pocl_dist.models.sources import MARKER, ModelFolder, model_digest
from pocl_dist.pipeline import cache_inputs, difficulty_files, evaluate, generated_files, plan
from pocl_dist.pipeline.inputs import result_inputs
from pocl_dist.pipeline.report import results
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.teacher.cache_files import HEAD, read_entry

Record = Mapping[str, JSONValue]
# The same as distributed.checkpoint.MANIFEST, which loads torch; a seal may lie beside it.
CHECKPOINT_MANIFEST = "MANIFEST.json"
CHECKPOINT_SEAL = "MANIFEST.json.sha256"
SHARD_SEAL = ".seal"


@dataclass(frozen=True)
class Chain:
    """The run, its config, and the hash of every file that could be read."""

    run: RunDirectory
    config: Config
    sha256: Mapping[str, str]

    def record(self, name: str) -> Record:
        """Returns a record of the run; empty when it is not there (the manifest tells)."""
        return read_json(self.run.root / name) if name in self.sha256 else {}

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Returns the files below a folder, sorted."""
        return sorted(
            name for name in self.sha256 if name.startswith(folder) and name.endswith(suffix)
        )


def _differing(name: str, found: Record, expected: Record, source: str) -> Iterator[str]:
    for key, value in sorted(expected.items()):
        if found.get(key) != value:
            yield f"{name}: {key} is {found.get(key)!r}, in {source} {value!r}"


def _same(name: str, key: str, record: Record, other: str, other_key: str, theirs: Record) -> str:
    """Returns a finding when two records name different digests of the same thing."""
    mine, expected = record.get(key), theirs.get(other_key)
    if not record or not theirs or mine == expected:
        return ""
    return f"{name}: {key} is {mine}, but {other} has {expected}"


def _shards(chain: Chain) -> Iterator[str]:
    for seal in chain.names("", SHARD_SEAL):
        shard = seal.removesuffix(SHARD_SEAL)
        if chain.record(seal).get("sha256") != chain.sha256.get(shard):
            yield f"{shard}: is not what {seal} says"


def _difficulty(chain: Chain) -> Iterator[str]:
    name = "difficulty/inputs.json"
    if name in chain.sha256 and plan.needs_difficulty(chain.config):
        expected = difficulty_files.config_keys(chain.config)
        yield from _differing(name, chain.record(name), expected, "config.yaml")


def _plan(chain: Chain) -> Iterator[str]:
    if "plan.json" not in chain.sha256:
        return
    plan.read_plan(chain.run.plan)  # its digest, and the ranking beside it
    inputs = cast("Record", chain.record("plan.json")["inputs"])
    yield from _differing("plan.json", inputs, plan.config_keys(chain.config), "config.yaml")
    if not plan.needs_difficulty(chain.config):
        return
    records = difficulty_files.read_records(chain.run.difficulty)
    if inputs.get("difficulty sha256") != plan.scores_digest(records):
        yield "plan.json: was made from other scores than those in difficulty/"
    key, source = "data.train sha256", "difficulty/inputs.json"
    yield _same("plan.json", key, inputs, source, key, chain.record(source))


def _generated(chain: Chain) -> Iterator[str]:
    name = "generated/inputs.json"
    expected = generated_files.config_inputs(chain.config)
    if name in chain.sha256:
        yield from _differing(name, chain.record(name), expected, "config.yaml")
    if chain.config.data.responses == "teacher" and "plan.json" in chain.sha256:
        file = generated_files.generated_data_set(chain.config)
        inputs = cast("Record", chain.record("plan.json")["inputs"])
        if read_rows(str(file), "data.responses").digest != inputs.get("data.train sha256"):
            yield f"plan.json: was made from other rows than those in {file}"


def _cache_entries(chain: Chain) -> Iterator[str]:
    folder = chain.run.teacher_cache
    entries = [f"teacher_cache/{HEAD}.json", *chain.names("teacher_cache/shard-", ".json")]
    for file in entries:
        if file in chain.sha256:
            entry = read_entry(folder, Path(file).stem)
            tensors = f"teacher_cache/{entry.name}.safetensors"
            if chain.sha256.get(tensors) != entry.sha256:
                yield f"{tensors}: is not what {file} says"
    for tensors in chain.names("teacher_cache/", ".safetensors"):
        if f"{tensors.removesuffix('.safetensors')}.json" not in chain.sha256:
            yield f"{tensors}: has no JSON beside it"


def _cache(chain: Chain) -> Iterator[str]:
    name = "teacher_cache/inputs.json"
    if name not in chain.sha256 or not chain.config.teacher.source.startswith("cache_"):
        return
    expected = cache_inputs.config_keys(chain.config, plan.read_plan(chain.run.plan))
    yield from _differing(name, chain.record(name), expected, "config.yaml and plan.json")
    inputs, key = cast("Record", chain.record("plan.json")["inputs"]), "data.train sha256"
    yield _same(name, key, chain.record(name), "plan.json", key, inputs)


def _checkpoints(chain: Chain) -> Iterator[str]:
    name = "checkpoints/inputs.json"
    record = chain.record(name)
    if record:
        yield from _differing(name, record, result_inputs(chain.config), "config.yaml")
        made = plan.read_plan(chain.run.plan)
        stages = [stage.to_json() for stage in made.stages]
        if record.get("digest.plan") != digest_of(cast("JSONValue", [list(made.ranking), stages])):
            yield f"{name}: digest.plan is not that of plan.json"
        inputs = cast("Record", chain.record("plan.json")["inputs"])
        yield _same(name, "digest.data", record, "plan.json", "data.train sha256", inputs)
        if plan.needs_difficulty(chain.config):
            source, key = "difficulty/inputs.json", "models.student model sha256"
            yield _same(name, "digest.student", record, source, key, chain.record(source))
        if chain.config.teacher.source.startswith("cache_"):
            source, key = "teacher_cache/inputs.json", "models.teacher model sha256"
            yield _same(name, "digest.teacher", record, source, key, chain.record(source))


def _checkpoint_files(chain: Chain) -> Iterator[str]:
    folders = {name.split("/")[1] for name in chain.names("checkpoints/step-")}
    for folder in sorted(folders):
        yield from _checkpoint(chain, f"checkpoints/{folder}")


def _checkpoint(chain: Chain, folder: str) -> Iterator[str]:
    """A checkpoint against its own manifest; one that was set aside (`bad-...`) is known to be."""
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
            yield _same(manifest, key, digests, "inputs.json", f"digest.{key}", inputs)
    if folder != f"checkpoints/step-{int(cast('int', record['step'])):08d}":
        yield f"{manifest}: is of step {record['step']}"


def _init_student(chain: Chain) -> Iterator[str]:
    training, cut = chain.record("checkpoints/inputs.json"), f"init_student/{MARKER}"
    if cut in chain.sha256 and chain.config.models.student.init_layers is not None:
        made = chain.record(cut)
        yield _same(cut, "digest.teacher", made, "checkpoints", "digest.teacher", training)
        found = {"digest": model_digest(ModelFolder(chain.run.init_student, "init_student"))}
        yield _same("init_student", "digest", found, "checkpoints", "digest.student", training)


def _export(chain: Chain) -> Iterator[str]:
    training, export = chain.record("checkpoints/inputs.json"), f"export/{MARKER}"
    if export not in chain.sha256:
        return
    record = chain.record(export)
    yield from _differing(export, record, result_inputs(chain.config), "config.yaml")
    if record.get("plan sha256") != chain.sha256.get("plan.json"):
        yield f"{export}: was made from another plan.json"
    for key in ("digest.student", "digest.teacher"):
        yield _same(export, key, record, "checkpoints/inputs.json", key, training)


def _eval(chain: Chain) -> Iterator[str]:
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
        yield from _differing(name, record, expected, "config.yaml, or of the model, ")
    for name in reports:
        if chain.record(name).get("model") != student:
            yield f"{name}: is of another model than export/"


def _report(chain: Chain) -> Iterator[str]:
    record = chain.record("report.json")
    if not record:
        return
    expected = results(chain.run)
    evals, theirs = (cast("Record", value["eval"]) for value in (record, expected))
    stale = [name for name in evals if evals[name] != theirs.get(name)]
    if record["stages"] != expected["stages"]:
        yield "report.json: is not about metrics.jsonl as it is; run `pocl-dist report`"
    for name in stale:
        yield f"report.json: is not about eval/{name}/report.json as it is; run `pocl-dist report`"


_LINKS: tuple[tuple[str, Callable[[Chain], Iterator[str]]], ...] = (
    ("shards", _shards),
    ("difficulty", _difficulty),
    ("plan.json", _plan),
    ("generated", _generated),
    ("teacher_cache", _cache_entries),
    ("teacher_cache/inputs.json", _cache),
    ("checkpoints/inputs.json", _checkpoints),
    ("checkpoints", _checkpoint_files),
    ("init_student", _init_student),
    ("export", _export),
    ("eval", _eval),
    ("report.json", _report),
)


def chain_findings(root: Path, sha256: Mapping[str, str]) -> list[str]:
    """Returns one line for each link that does not hold; `sha256` has every file that is there."""
    if "config.yaml" not in sha256:
        return ["config.yaml: missing"]
    try:
        config = load_config([root / "config.yaml"])
    except PoclError as error:
        return [f"config.yaml: {error}"]
    # The folder may have been moved since: what lies in it is looked for in it.
    config = config.model_copy(update={"run_dir": str(root)})
    chain = Chain(RunDirectory(root), config, sha256)
    findings: list[str] = []
    for name, link in _LINKS:
        try:
            for line in link(chain):
                if line:
                    findings.append(line)
        except (PoclError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            # A record that is damaged or hostile: JSON of any form.
            findings.append(f"{name}: cannot be followed: {type(error).__name__}: {error}")
    return [" ".join(line.split()) for line in findings]  # messages of steps have several lines
