"""When the element-wise part is compiled, and what happens where it cannot be.

`auto` decides by device, vocabulary and number of logits only, so a resumed run computes the same
bits. Compiled code lies where torch puts it (TORCHINDUCTOR_CACHE_DIR, else the temporary folder).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable

import torch

from pocl_dist.errors import ConfigError
from pocl_dist.losses.elementwise import BlockKind, BlockTerms, Factors, block_terms
from pocl_dist.losses.registry import Divergence

COMPILE_MODES = ("auto", "always", "never")

MIN_VOCABULARY = 2**14
"""Smaller ones are not compiled under `auto`: 5 to 15 s of compilation save too little."""

MIN_LOGITS = 2**21
"""A call with fewer logits of labelled tokens runs as it is under `auto`: nothing to gain."""

_Function = Callable[[torch.Tensor, torch.Tensor | None, Factors], BlockTerms]


class BlockCompiler:
    """Makes compiled functions on demand, one per kind of block, and keeps them."""

    def __init__(self) -> None:
        self.functions: dict[tuple[object, ...], _Function] = {}
        self.has_failed = False

    def is_used(
        self,
        mode: str,
        divergence: Divergence,
        device: torch.device,
        *,
        num_tokens: int,
        vocabulary_size: int,
    ) -> bool:
        """Returns whether a call of this size runs compiled.

        Raises ConfigError that names `loss.compile` for an unknown mode, and under `always` for
        what cannot be compiled.
        """
        if mode not in COMPILE_MODES:
            raise ConfigError(f"loss.compile: {mode!r} must be one of {', '.join(COMPILE_MODES)}")
        if mode == "never":
            return False
        obstacle = _obstacle(divergence, device.type)
        if mode == "always":
            if obstacle is not None:
                raise ConfigError(f"loss.compile: 'always' is not possible here: {obstacle}")
            return num_tokens > 1
        is_large = vocabulary_size >= MIN_VOCABULARY and num_tokens * vocabulary_size >= MIN_LOGITS
        return is_large and num_tokens > 1 and obstacle is None and not self.has_failed

    def block_terms(
        self,
        mode: str,
        kind: BlockKind,
        logits_BR: torch.Tensor,
        teacher_logits_BR: torch.Tensor | None,
        factors: Factors,
    ) -> BlockTerms:
        """Returns `block_terms` by compiled code; a single row runs as it is. Factors: tensors.

        If the compiler fails: under `auto` warns, once, and runs this and every later call of the
        process uncompiled; under `always` raises ConfigError.
        """
        if len(logits_BR) == 1 or (
            self.has_failed and mode == "auto"
        ):  # one row would be a compilation of its own
            return block_terms(kind, logits_BR, teacher_logits_BR, factors)
        for tensor_BR in (logits_BR, teacher_logits_BR):
            if tensor_BR is not None:
                # One compilation for every number of rows; the vocabulary is fixed.
                torch._dynamo.mark_dynamic(tensor_BR, 0)
        try:
            return self._function(kind)(logits_BR, teacher_logits_BR, factors)
        except (
            torch._dynamo.exc.TorchDynamoException,
            torch._dynamo.exc.FailOnRecompileLimitHit,  # 8 kinds in one process, no run has that
        ) as error:
            if mode == "always":
                raise ConfigError(
                    f"loss.compile: 'always', but compiling failed: {error}"
                ) from error
            self.has_failed = True
            warnings.warn(
                "loss.compile: compiling the element-wise part failed, so it runs uncompiled (same "
                f"result, slower); `loss.compile: never` silences this. The error: {error}",
                stacklevel=2,
            )
            return block_terms(kind, logits_BR, teacher_logits_BR, factors)

    def _function(self, kind: BlockKind) -> _Function:
        divergence = kind.divergence
        key = (divergence.name, *divergence.kwargs.values(), divergence.function, *kind[1:])
        if key not in self.functions:

            def run(
                logits_BR: torch.Tensor, teacher_logits_BR: torch.Tensor | None, factors: Factors
            ) -> BlockTerms:
                return block_terms(kind, logits_BR, teacher_logits_BR, factors)

            # fullgraph: what cannot be fused is an error that is seen, not a slow mixture.
            self.functions[key] = torch.compile(run, fullgraph=True)
        return self.functions[key]


BLOCK_COMPILER = BlockCompiler()
"""The one of this process: compiled code is worth keeping for all later calls."""


def _obstacle(divergence: Divergence, device_type: str) -> str | None:
    """Returns why nothing can be compiled, or None."""
    if not divergence.is_compilable:
        return f"{divergence.name} is no formula that can be fused"
    compiler = os.environ.get("CXX", "g++")
    if device_type == "cpu" and shutil.which(compiler) is None:
        return f"the C++ compiler {compiler} is not installed"
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None
