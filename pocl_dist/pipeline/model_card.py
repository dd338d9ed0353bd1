"""The model card of the export: how the student was made, how good it is, how to load it.

It is meant to be published: local paths are cut to their last part, beside the digest of what lies
there, and nothing of this machine, its user or its job stands in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pocl_dist.config import Config, select_keys
from pocl_dist.data.encoding import render_plain
from pocl_dist.files import JSONValue, atomic_write_text, digest_of, read_json, read_json_lines
from pocl_dist.pipeline.card_method import loss_sentence, origin, summary
from pocl_dist.pipeline.card_names import FILE, front_matter, public_name
from pocl_dist.pipeline.harness import figures_of
from pocl_dist.pipeline.inputs import result_inputs
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import Example, Stage
from pocl_dist.versions import versions

SCORES_HEAD = "\n## Scores\n\n"
TRAINING_HEAD = "\n\n## Training\n\n"


@dataclass(frozen=True)
class _Course:
    """How training went up to the step that is exported, by stage."""

    num_steps: Mapping[int, int]
    dev: Mapping[int, float]  # at the stage's end

    @classmethod
    def read(cls, run: RunDirectory, last_step: int) -> _Course:
        num_steps: Counter[int] = Counter()
        dev: dict[int, float] = {}
        for row in read_json_lines(run.metrics):
            stage, step = int(cast("int", row["stage"])), int(cast("int", row["step"]))
            if row["kind"] == "step" and step <= last_step:
                num_steps[stage] += 1
            elif row["kind"] == "dev" and step <= last_step:
                dev[stage] = float(cast("float", row["value"]))
        return cls(num_steps, dev)


def _stage_table(stages: Sequence[Stage], course: _Course) -> str:
    head = "| stage | rows | temperature | KD ratio | steps | visits | dev at its end |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for stage in stages:
        done = course.num_steps.get(stage.index, 0)
        visits = stage.num_examples * stage.epochs * done / max(stage.num_steps, 1)
        value = f"{course.dev[stage.index]:.2f}" if stage.index in course.dev else ""
        lines.append(
            f"| {stage.index + 1} | {stage.num_examples} | {stage.temperature:.3g} | "
            f"{stage.kd_ratio:.3g} | {done} | {visits:.0f} | {value} |"
        )
    return "\n".join(lines)


def _scores(run: RunDirectory) -> str:
    """Returns the test scores as tables; empty before `evaluate`."""
    parts = []
    reports = [read_json(file) for file in sorted(run.eval.glob("*/report.json"))]
    if reports:
        rows = [
            f"| {r['set']} | {r['num_examples']} | {r['rouge_l']:.2f} | {r['exact_match']:.2f} |"
            for r in reports
        ]
        head = ["| test set | rows | ROUGE-L, % | exact match, % |", "|---|---|---|---|"]
        parts.append("\n".join([*head, *rows]))
    files = sorted((run.eval / "harness").glob("task-*.json"))
    rows = [
        f"| {task} | {metric} | {value:.4f} |"
        for file in files
        for task, metric, value, _ in figures_of(read_json(file))
    ]
    if rows:
        head = ["| lm-evaluation-harness task | metric | value |", "|---|---|---|"]
        parts.append("\n".join([*head, *rows]))
    return "\n\n".join(parts) or "Not evaluated on a test set."


def _digest_table(config: Config, inputs: Mapping[str, JSONValue]) -> str:
    names = {
        "data": f"training rows `{public_name(config.data.train)}`",
        "student": f"student before, {origin(config)}",
        "plan": "ranking and stages",
        "tokenizer": "tokenizer",
    }
    if config.models.teacher is not None:
        names["teacher"] = f"teacher `{public_name(config.models.teacher.path)}`"
    rows = [
        f"| {text} | `{inputs[f'digest.{key}']}` |"
        for key, text in names.items()
        if inputs.get(f"digest.{key}")
    ]
    return "\n".join(["| made from | sha256 |", "|---|---|", *rows])


_SETTINGS = ("optimizer", "data.template", "data.max_tokens", "data.max_prompt_tokens",
             "engine.global_batch_size", "curriculum.ordering", "curriculum.optimizer",
             "curriculum.advance", "export.select", "seed")  # fmt: skip


def _settings(config: Config) -> str:
    values = select_keys(config, _SETTINGS)
    return "\n".join(f"- `{key}: {value}`" for key, value in sorted(values.items()))


def _prompt(config: Config) -> str:
    """Returns the lines of the example that make a prompt as training rows were rendered."""
    ask = '"What is a red panda?"'
    template = config.data.template
    if template == "chat":
        return (
            f'messages = [{{"role": "user", "content": {ask}}}]\n'
            "text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, "
            "tokenize=False)"
        )
    prompt = render_plain(template, Example("", "", "", ()))
    return f"text = {prompt.prefix!r} + {ask} + {prompt.suffix!r}"


def _how_to_load(config: Config) -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the name it was published under
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
{_prompt(config)}
inputs = tokenizer(text, return_tensors="pt", add_special_tokens={config.data.template != "chat"})
ids, mask = inputs["input_ids"], inputs["attention_mask"]
output = model.generate(ids, attention_mask=mask, max_new_tokens={config.generation.max_new_tokens})
answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
print(answer)
```"""


def model_card(
    config: Config,
    run: RunDirectory,
    stages: Sequence[Stage],
    inputs: Mapping[str, JSONValue],
    step: int,
    student_folder: Path,
) -> str:
    """Returns the card of the export of `step`; `inputs` has the digests of what it is made from.

    `student_folder`: of the student before training, whose card may name a licence.
    """
    made_by = ", ".join(
        f"{name} {value}" for name, value in versions().items() if value and "sha256" not in name
    )
    model = "its teacher" if config.models.teacher is not None else "its rows"
    dev = config.dev.metric if config.data.dev else "none"
    return f"""{front_matter(config, student_folder)}
# Distilled student

{summary(config, len(stages), step)}

## How to load

{_how_to_load(config)}

## Use and limits

Made for prompts like its training rows, in the template above; on others it may answer worse than
the model that it was made from. It was taught to imitate {model} and has the errors and biases of
both; its answers were not checked for truth or harm.
{SCORES_HEAD}{_scores(run)}{TRAINING_HEAD}{loss_sentence(config)}

{_stage_table(stages, _Course.read(run, step))}

Dev metric: {dev}. Visits: how often a row was trained on, summed.

{_settings(config)}

{_digest_table(config, inputs)}

Config of the result: sha256 `{digest_of(result_inputs(config))}`. Made with `pocl-dist run`;
{made_by}.
"""


def update_card(run: RunDirectory) -> None:
    """Puts the scores that there are now into the card of the export, if it is one of ours."""
    path = run.export / FILE
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before, head, rest = text.partition(SCORES_HEAD)
    _, tail, after = rest.partition(TRAINING_HEAD)
    if not head or not tail:
        return
    updated = f"{before}{head}{_scores(run)}{tail}{after}"
    if updated != text:
        atomic_write_text(path, updated)
