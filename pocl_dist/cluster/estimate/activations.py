"""Bytes that a forward pass leaves for backward, by what autograd saves in transformers' modules.

Counted operator by operator for eager code with `scaled_dot_product_attention`, and compared with
saved tensors in docs/scaling.md. s bytes of a number; norms work in fp32 whatever s is.
"""

from __future__ import annotations

from pocl_dist.cluster.estimate.shapes import ModelShape

_GELU_NEW = ("gelu_new", "gelu_fast")


def norm_bytes(shape: ModelShape, size: int, s: int, *, is_result_kept: bool = True) -> int:
    """Returns what a norm over `size` numbers saves for a token.

    RMS norm, written in Python: its input in fp32 (where s is 4 the input itself), the scaled one,
    and its result where a product needs it. A fused layer norm: input and result.
    """
    result = s if is_result_kept else 0
    if shape.family.has_rms_norm or shape.model_type == "cohere":
        return size * (4 + (4 if shape.family.has_fp32_norm else s) + result)
    return size * (s + result)


def layer_bytes(shape: ModelShape, s: int, *, is_training: bool = True) -> int:
    """Returns what one layer saves for a token, besides matrices of attention."""
    saved = min(2, shape.family.num_norms) * norm_bytes(shape, shape.hidden, s)
    for _ in range(2, shape.family.num_norms):  # after a part: its result is added, not multiplied
        saved += norm_bytes(shape, shape.hidden, s, is_result_kept=False)
    if shape.family.has_qk_norm:
        saved += norm_bytes(shape, shape.query + shape.kv, s, is_result_kept=False)
    # Queries, keys, values and the result; the sums of the softmax in fp32.
    keys = shape.query if shape.has_softcap else shape.kv
    saved += s * (2 * shape.query + 2 * keys) + 4 * shape.num_heads
    saved += s * shape.ffn * _feed_forward_tensors(shape)
    if is_training and shape.dropout > 0:
        saved += 2 * shape.hidden  # masks of one byte after attention and feed-forward
    return saved


def _feed_forward_tensors(shape: ModelShape) -> int:
    if shape.family.is_gated:  # both products, the activation, their product
        return 4
    if shape.activation == "relu":
        return 1
    # As a formula: input, tanh, one plus it, half the input, the result; fused: input and result.
    return 5 if shape.activation in _GELU_NEW else 2


def attention_matrix_bytes(
    shape: ModelShape, num_rows: int, length: int, s: int, *, is_cpu: bool
) -> int:
    """Returns what one layer's attention saves besides, where no fused kernel can be taken.

    With a soft cap: tanh, softmax in fp32 and what is made of it. With dropout on a CPU: softmax,
    mask and their product in fp32, as are queries, keys and values then.
    """
    matrix = num_rows * shape.num_heads * length * length
    if shape.has_softcap:
        return matrix * (4 + s + (s if s < 4 else 0))
    if is_cpu and shape.attention_dropout > 0:
        return 12 * matrix + num_rows * length * 3 * shape.query * (4 - s)
    return 0


def activation_bytes(
    shape: ModelShape, num_rows: int, length: int, s: int, *, is_checkpointed: bool, is_cpu: bool
) -> int:
    """Returns what a forward pass of the backbone over rows of `length` tokens keeps.

    With checkpointing: each layer's input, and one layer's own while it is recomputed.
    """
    tokens = num_rows * length
    one = tokens * layer_bytes(shape, s)
    one += attention_matrix_bytes(shape, num_rows, length, s, is_cpu=is_cpu)
    layers = (
        shape.num_layers * tokens * shape.hidden * s + one
        if is_checkpointed
        else (shape.num_layers * one)
    )
    ends = norm_bytes(shape, shape.hidden, s)  # the last norm and its result
    if shape.head_hidden != shape.hidden:
        ends += s * (shape.hidden + shape.head_hidden)
    if shape.dropout > 0:
        ends += shape.hidden
    return layers + tokens * (ends + 16)  # ids, labels


def forward_bytes(shape: ModelShape, tokens: int, s: int) -> int:
    """Returns what a pass without gradients needs at once: the widest part of one layer."""
    wide = max(3 * shape.ffn if shape.family.is_gated else 2 * shape.ffn, 3 * shape.query)
    return tokens * (s * (2 * shape.hidden + wide) + 4 * shape.hidden)
