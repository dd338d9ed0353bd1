"""The chain of a run: does each result belong to the one that it says it was made from?

config.yaml -> difficulty -> plan -> generated, teacher_cache -> checkpoints -> export -> eval ->
report.json. Every step wrote down what it was made from; here the records are held against one
another and against the files, by their digests. Who changes a file and seals the folder anew is
found here. Rows and models outside of the folder are not read again: the steps do that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

from pocl_dist.config import load_config
from pocl_dist.config.steps import needs_difficulty
from pocl_dist.data.row_index import damaged_files
from pocl_dist.data.sources import read_rows
from pocl_dist.errors import PoclError
from pocl_dist.pipeline import (
    cache_inputs,
    difficulty_files,
    generated_files,
    plan,
    plan_files,
    verify_result,
)
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.scores import read_scores
from pocl_dist.pipeline.verify_records import Chain, Record, differing, same
from pocl_dist.teacher.cache_files import HEAD, read_entry

SHARD_SEAL = ".seal"


def _shards(chain: Chain) -> Iterator[str]:
    for seal in chain.names("", SHARD_SEAL):
        shard = seal.removesuffix(SHARD_SEAL)
        if chain.record(seal).get("sha256") != chain.sha256.get(shard):
            yield f"{shard}: is not what {seal} says"


def _rows(chain: Chain) -> Iterator[str]:
    def sha256_of(path: Path) -> str:
        return chain.sha256.get(path.relative_to(chain.run.root).as_posix(), "")

    for name in sorted({name.split("/")[1] for name in chain.names("rows/")}):
        for path in damaged_files(chain.run.rows / name, sha256_of):
            yield f"{path.relative_to(chain.run.root).as_posix()}: is not what was written"


def difficulty(chain: Chain) -> Iterator[str]:
    name = "difficulty/inputs.json"
    if name in chain.sha256 and needs_difficulty(chain.config):
        expected = difficulty_files.config_keys(chain.config)
        yield from differing(name, chain.record(name), expected, "config.yaml")


def _plan(chain: Chain) -> Iterator[str]:
    if "plan.json" not in chain.sha256:
        return
    plan_files.read_plan(chain.run.plan)  # its digest, and the ranking beside it
    inputs = cast("Record", chain.record("plan.json")["inputs"])
    yield from differing("plan.json", inputs, plan.config_keys(chain.config), "config.yaml")
    if not needs_difficulty(chain.config):
        return
    if inputs.get("difficulty sha256") != read_scores(chain.run.difficulty).digest():
        yield "plan.json: was made from other scores than those in difficulty/"
    key, source = "data.train sha256", "difficulty/inputs.json"
    yield same("plan.json", key, inputs, source, key, chain.record(source))


def _generated(chain: Chain) -> Iterator[str]:
    name = "generated/inputs.json"
    expected = generated_files.config_inputs(chain.config)
    if name in chain.sha256:
        yield from differing(name, chain.record(name), expected, "config.yaml")
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
    expected = cache_inputs.config_keys(chain.config, plan_files.read_plan(chain.run.plan))
    yield from differing(name, chain.record(name), expected, "config.yaml and plan.json")
    inputs, key = cast("Record", chain.record("plan.json")["inputs"]), "data.train sha256"
    yield same(name, key, chain.record(name), "plan.json", key, inputs)


_LINKS: tuple[tuple[str, Callable[[Chain], Iterator[str]]], ...] = (
    ("shards", _shards),
    ("rows", _rows),
    ("difficulty", difficulty),
    ("plan.json", _plan),
    ("generated", _generated),
    ("teacher_cache", _cache_entries),
    ("teacher_cache/inputs.json", _cache),
    ("checkpoints/inputs.json", verify_result.checkpoints),
    ("checkpoints", verify_result.checkpoint_files),
    ("init_student", verify_result.init_student),
    ("export", verify_result.export),
    ("eval", verify_result.eval),
    ("eval/harness", verify_result.harness),
    ("report.json", verify_result.report),
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
