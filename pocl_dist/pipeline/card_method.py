"""The words of the model card on method and loss: a function of the config alone."""

from __future__ import annotations

from collections.abc import Mapping

from pocl_dist.config import Config
from pocl_dist.config.loss_names import LOSSES, complete_kwargs
from pocl_dist.pipeline.card_names import public_name

FORMULAS: Mapping[str, str] = {
    "forward_kl": "Σ t (log t − log s)",
    "reverse_kl": "Σ s (log s − log t)",
    "jensen_shannon": "w KL(s‖m) + (1 − w) KL(t‖m), m = (1 − w) t + w s, w = {student_weight:g}",
    "total_variation": "½ Σ |t − s|",
    "skew_forward_kl": "KL(t ‖ α t + (1 − α) s), α = {skew:g}",
    "skew_reverse_kl": "KL(s ‖ (1 − α) t + α s), α = {skew:g}",
    "symmetric_kl": "(1 − w) KL(t‖s) + w KL(s‖t), w = {reverse_weight:g}",
    "adaptive_kl": "a KL(t‖s) + (1 − a) KL(s‖t), a by the gap on the head of mass {head_mass:g}",
    "alpha_beta": "the α-β divergence (arXiv 2505.04560), α = {alpha:g}, β = {beta:g}",
}
"""Of a token, with the teacher's and the student's probabilities t and s at temperature T."""


def origin(config: Config) -> str:
    """Returns what the student was made from."""
    student, teacher = config.models.student, config.models.teacher
    if student.path is not None:
        text = f"`{public_name(student.path)}`"
    else:
        assert teacher is not None, "checked with the config"
        text = f"layers {student.init_layers} of `{public_name(teacher.path)}`"
    if student.adapter is not None:
        text += f" with adapter `{public_name(student.adapter)}`"
    return text


def _method(config: Config, num_stages: int) -> str:
    if config.models.teacher is None:
        text = "supervised fine-tuning"
    elif num_stages == 1:
        text = f"distillation ({config.loss.name}), no curriculum"
    elif config.curriculum.ordering != "curriculum":
        ordering = config.curriculum.ordering
        text = f"distillation ({config.loss.name}) in {num_stages} stages, ordering {ordering}"
    else:
        text = f"distillation ({config.loss.name}) with the POCL curriculum (arXiv 2506.05695)"
    if config.data.responses == "teacher":
        text += ", on the teacher's answers (SeqKD)"
    if config.policy.mode != "off":
        text += f", on-policy ({config.policy.mode})"
    if config.models.student.lora is not None:
        text += f", LoRA of rank {config.models.student.lora.rank} (merged)"
    return text


def loss_sentence(config: Config) -> str:
    """Returns the loss with its formula."""
    if config.models.teacher is None:
        return "Loss: the mean cross-entropy of the response tokens, end of text included."
    kwargs = complete_kwargs(config.loss.name, config.loss.kwargs)
    formula = FORMULAS[config.loss.name].format(**kwargs)
    return (
        f"Loss, a mean over the response tokens of the whole batch: `ratio · scale(T) · D_T + "
        f"(1 − ratio) · CE`, with D_T = {formula} per token, between teacher t and student s at "
        f"temperature T; scale: `{config.loss.temperature_scaling}` (order "
        f"{LOSSES[config.loss.name].temperature_order} in T); CE: cross-entropy of the reference."
    )


def summary(config: Config, num_stages: int, step: int) -> str:
    """Returns what was made from what, and how, as a list."""
    teacher = config.models.teacher
    name = "none" if teacher is None else f"`{public_name(teacher.path)}`"
    if teacher is not None and teacher.adapter is not None:
        name += f" with adapter `{public_name(teacher.adapter)}`"
    train = public_name(config.data.train)
    return f"""- student made from: {origin(config)}
- teacher: {name}
- method: {_method(config, num_stages)}
- training rows: `{train}`, template `{config.data.template}`
- {step} optimizer steps of {config.engine.global_batch_size} rows, seed {config.seed}"""
