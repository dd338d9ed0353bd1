"""Teacher and student by their settings and file headers: there, whole, supported."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pocl_dist.cluster.doctor.case import Case, Model, Role
from pocl_dist.cluster.doctor.checks.disk import size
from pocl_dist.cluster.doctor.finding import (
    SEE_ABOVE,
    Finding,
    SkipError,
    error,
    ok,
    skipped,
    warning,
)
from pocl_dist.config import Config, ModelConfig, StudentConfig
from pocl_dist.errors import PoclError
from pocl_dist.files import free_bytes
from pocl_dist.models.adapters import find_adapter
from pocl_dist.models.config_fit import check_layers, check_positions, longest_sequences
from pocl_dist.models.header import ModelHeader, causal_model_types, read_model_header
from pocl_dist.models.locate import locate_model
from pocl_dist.models.sources import cache_folder

# Numbers in a config that scale or bend logits; `models/heads.py` knows the first group.
_KNOWN_OF_HEADS = {"logit_scale", "logits_scaling", "final_logit_softcapping"}
_NEUTRAL = (None, 0, 1, 1.0, False, True)


_HOW = {
    66: "correct the path; a relative one counts from the folder in which the command is given",
    69: "download it where there is a network (hf download OWNER/NAME), or set HF_HOME to where "
    "it is",
    77: "take a model of safetensors and settings alone, or read what its author's code does",
}


def named_models(config: Config) -> list[tuple[Role, ModelConfig | StudentConfig]]:
    """Returns the models that the config names by a path, the teacher first."""
    found: list[tuple[Role, ModelConfig | StudentConfig]] = []
    if config.models.teacher is not None:
        found.append(("teacher", config.models.teacher))
    if config.models.student.path is not None:
        found.append(("student", config.models.student))
    return found


def models(case: Case) -> Iterator[Finding]:
    """Finds each model, reads its settings and the headers of its weights, and its adapter."""
    for role, given in named_models(case.config):
        try:
            yield from _model(case, role, given)
        except PoclError as problem:  # the other model is looked at all the same
            yield error(problem.exit_code, str(problem), how=_HOW.get(problem.exit_code, ""))


def _model(case: Case, role: Role, given: ModelConfig | StudentConfig) -> Iterator[Finding]:
    assert given.path is not None
    key = f"models.{role}.path"
    scratch = case.scratch / role
    located = locate_model(given.path, key, given.revision, given.trust_remote_code, scratch)
    header = read_model_header(located.path, given.path, key, located.has_weights)
    case.models[role] = Model(located, header)
    yield ok(f"{role}: {_described(header)} ({given.path})")
    if not located.has_weights:
        yield skipped(
            f"{role}: the weights of {given.path} are on the hub and not in its cache here: the "
            "run downloads them",
            f"`hf download {given.path}` where there is a network, then run doctor again",
        )
    if located.path.is_file():
        yield from _room_for_conversion(role, header)
    if given.adapter is not None:
        adapter = find_adapter(given.adapter, f"models.{role}.adapter")
        yield ok(f"{role}: adapter {adapter.origin} is there")


def _described(header: ModelHeader) -> str:
    parts = [header.architecture or header.model_type or "unknown architecture"]
    if header.num_layers is not None:
        parts.append(f"{header.num_layers} layers")
    if header.hidden_size is not None:
        parts.append(f"width {header.hidden_size}")
    if header.tensors:
        parts.append(f"{header.num_parameters / 1e6:.1f}M parameters")
    return ", ".join(parts)


def _room_for_conversion(role: Role, header: ModelHeader) -> Iterator[Finding]:
    folder, needed = cache_folder(), 4 * header.num_parameters
    if free_bytes(folder) < needed:
        yield error(
            74,
            f"{role}: a GGUF file is converted once, into {folder}: it takes {size(needed)}, "
            f"{size(free_bytes(folder))} are free",
            how="make room, or set POCL_DIST_CACHE to a folder on a larger disk",
        )


def layers_and_positions(case: Case) -> Iterator[Finding]:
    """Compares layers and sequence lengths with what the models have."""
    config, told = case.config, []
    for role, _ in named_models(config):
        positions = case.model(role).header.num_positions
        check_positions(config, positions, f"models.{role}")
        told.append(f"{role} {'without bound' if positions is None else positions}")
    layers = config.models.student.init_layers
    if layers is not None:
        num_layers = case.model("teacher").header.num_layers
        if num_layers is None:
            raise SkipError("the teacher's settings do not say how many layers it has")
        check_layers(num_layers, layers)
        told.append(f"student from {len(layers)} of {num_layers} layers")
    longest = max(longest_sequences(config).values())
    yield ok(f"sequences of up to {longest} tokens fit; positions: {', '.join(told)}")


def architectures(case: Case) -> Iterator[Finding]:
    """Whether transformers has the architecture, and whether its head is one that we take apart."""
    for role, given in named_models(case.config):
        if role not in case.models:
            yield skipped(f"models.{role} could not be read {SEE_ABOVE}")
            continue
        header = case.models[role].header
        known = causal_model_types()
        if case.models[role].located.path.is_file():
            yield skipped(f"{role}: which GGUF architectures it reads, only transformers knows")
        elif not known:
            yield skipped("transformers is not installed here, or keeps its list elsewhere")
        elif header.model_type not in known and not given.trust_remote_code:
            yield error(
                66,
                f"{role}: transformers has no causal language model of model_type "
                f"{header.model_type!r} ({given.path})",
            )
        else:
            yield from _head(case, role, header)


def _head(case: Case, role: Role, header: ModelHeader) -> Iterator[Finding]:
    head = header.head()
    bending = sorted(
        name
        for name, value in header.settings.items()
        if any(word in name for word in ("logit", "lm_head", "output_multiplier"))
        and name not in _KNOWN_OF_HEADS
        and isinstance(value, int | float)
        and value not in _NEUTRAL
    )
    if case.config.loss.full_logits:
        yield ok(f"{role}: {header.architecture}; loss.full_logits takes the model's own logits")
    elif bending:
        yield warning(
            f"{role}: {header.architecture} has {', '.join(bending)} in its config",
            "Its logits may be more than a linear head over hidden states; the run compares the "
            "two when it starts, and would end with 78.",
            "try a few rows first (data.limit=8), or set loss.full_logits: true",
        )
    elif head is None and header.tensors:
        yield skipped(
            f"{role}: no tensor could be told to be the head; the run compares logits at its start"
        )
    else:
        rows = f", {head.shape[0]} rows" if head is not None else ""
        name = f", head {head.name}{rows}" if head is not None else ""
        yield ok(f"{role}: {header.architecture}{name}")


def lora(case: Case) -> Iterator[Finding]:
    """Whether the layers that LoRA is to adapt are there, by the names of the tensors."""
    given = case.config.models.student.lora
    if given is None:
        return
    header = case.model(case.trained_role).header
    names = {t.name.removesuffix(".weight") for t in header.tensors if len(t.shape) == 2}
    if not names:
        raise SkipError("without the weights the names of the layers are not known")
    missing = [
        target
        for target in given.target_modules or []
        if not any(name == target or name.endswith(f".{target}") for name in names)
    ]
    if missing:
        ends = sorted({name.rpartition(".")[2] for name in names})
        yield error(
            64,
            f"models.student.lora.target_modules: {', '.join(missing)} is the name of no layer; "
            f"there are {', '.join(ends[:12])}",
            how="name layers of this architecture, or leave target_modules out: all linear layers",
        )
    else:
        chosen = ", ".join(given.target_modules or ["all linear layers"])
        yield ok(f"LoRA of rank {given.rank} on {chosen}")


def hub_token(case: Case) -> Iterator[Finding]:
    """Whether a token for the hub lies where others can read it; the token itself is not shown."""
    token = os.environ.get("HF_TOKEN_PATH")
    if token is None:
        return
    try:
        mode = os.stat(token).st_mode
    except OSError as problem:
        yield warning(
            f"HF_TOKEN_PATH: {token}: {problem.strerror}",
            "Gated models cannot be downloaded.",
            "`hf auth login`, or unset HF_TOKEN_PATH",
        )
        return
    if mode & 0o077:
        yield warning(
            f"{token} can be read by others (mode {mode & 0o777:o})",
            "It holds your token for the hub.",
            f"chmod 600 {token}",
        )
