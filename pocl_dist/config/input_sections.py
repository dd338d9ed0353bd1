"""Config sections of what goes in: models and rows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pocl_dist.config.section import Section, Text


class ModelConfig(Section):
    """Where a model comes from."""

    path: Text
    """Local folder, GGUF file, `package:IMPORT_NAME/FILE`, or hub id."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id; it is resolved once and the commit recorded."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""
    adapter: Text | None = None
    """LoRA adapter to merge into the weights: peft folder, or hub id `OWNER/NAME[@REVISION]`."""


class LoRAConfig(Section):
    """Low-rank updates beside frozen weights (arXiv 2106.09685): W + alpha / rank * B A."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Columns of B and rows of A."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the update's input, in training only."""
    target_modules: Annotated[list[Text], Field(min_length=1)] | None = None
    """Names of linear layers, or their ends (`q_proj`); null: all but the LM head."""


class StudentConfig(Section):
    """The model that is trained. Without `path` it is cut from the teacher by `init_layers`."""

    path: Text | None = None
    """As `models.teacher.path`; null with `init_layers`: the student is made from the teacher."""
    init_layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Teacher layers that the student keeps, ascending (depth pruning)."""
    revision: Text | None = None
    """As `models.teacher.revision`."""
    trust_remote_code: bool = False
    """As `models.teacher.trust_remote_code`."""
    adapter: Text | None = None
    """As `models.teacher.adapter`: where the training starts."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters only, merged on export; null trains all weights."""


class ModelsConfig(Section):
    """Teacher and student."""

    teacher: ModelConfig | None
    """The frozen teacher; null trains the student by SFT alone (teacher fine-tuning)."""
    student: StudentConfig
    """The model that is trained."""


class DataConfig(Section):
    """Rows, template and lengths."""

    train: Text
    """JSONL/Parquet file, `package:IMPORT_NAME/FILE` or hub id `OWNER/NAME[@REVISION][#SPLIT]`."""
    dev: Text | None = None
    """Rows for the dev metric; null: none is computed."""
    eval: list[Text] = []
    """Test sets of `evaluate`."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use the first rows of `train` only."""
    dev_limit: Annotated[int, Field(ge=1)] | None = None
    """Use the first rows of `dev` only."""
    eval_limit: Annotated[int, Field(ge=1)] | None = None
    """Use the first rows of each test set only."""
    responses: Literal["references", "teacher"] = "references"
    """`teacher` (SeqKD): train on the teacher's answers to the prompts of `train`, which `generate`
    writes, instead of on the rows' own responses."""
    template: Text = "alpaca"
    """`alpaca` (as published), `short`, `chat` (the tokenizer's), or text with `{prompt}` in it."""
    max_tokens: Annotated[int, Field(ge=2)] = 512
    """Prompt + response + eos; a longer response is cut at its end."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 256
    """A longer prompt is cut on the left of its content; the response marker stays."""
    on_bad_row: Literal["fail", "quarantine"] = "fail"
    """`fail` stops with exit code 65; `quarantine` lists bad rows in a file and goes on."""
    max_bad_rows: Annotated[int, Field(ge=0)] = 100
    """With `quarantine`: more bad rows than this in one file stop the run all the same. Also the
    most rows of measure, generate, evaluate or cache that may fail or have no finite score."""
