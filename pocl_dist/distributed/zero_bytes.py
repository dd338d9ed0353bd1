"""Bytes per rank of parameters, gradients and optimizer state, by formula. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

OPTIMIZER_BYTES = 12  # AdamW's two moments and the fp32 weights that it updates


@dataclass(frozen=True)
class HeldBytes:
    """Bytes on one rank; activations and buffers of collectives are not among them."""

    parameters: int
    gradients: int
    optimizer: int


def expected_bytes(
    num_parameters: int,
    zero_stage: int,
    world_size: int,
    *,
    num_trained: int | None = None,
    weight_bytes: int = 4,
    gradient_bytes: int = 4,
) -> HeldBytes:
    """Returns what AdamW in fp32 needs per rank (Rajbhandari et al., arXiv 1910.02054, section 5).

    P parameters of w bytes (4, or 2 for bf16), n ranks, two moments. Gradients are added up in fp32
    also where weights are bf16 (`grad_accum_dtype`); g is 4, or 2 for fp16. DeepSpeed 0.19 updates
    a copy of a rank's part also where weights are fp32 already, so the paper's 8 P / n of an fp32
    optimizer are 12 P / n:

    stage   parameters   gradients   optimizer
    0       w P          g P         8 P
    1       w P          g P         12 P / n
    2       w P          g P / n     12 P / n
    3       w P / n      g P / n     12 P / n

    With `num_trained` (adapters) gradients and optimizer are those of the trained parameters alone.
    """
    trained = num_parameters if num_trained is None else num_trained
    part = -(-trained // world_size)
    if zero_stage == 0:
        return HeldBytes(weight_bytes * num_parameters, gradient_bytes * trained, 8 * trained)
    num_held = -(-num_parameters // world_size) if zero_stage == 3 else num_parameters
    return HeldBytes(
        parameters=weight_bytes * num_held,
        gradients=gradient_bytes * (trained if zero_stage == 1 else part),
        optimizer=OPTIMIZER_BYTES * part,
    )
