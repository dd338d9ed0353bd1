"""Config sections of the passes over rows: answers, difficulty, teacher data, test sets, actors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pocl_dist.config.section import Line, Section, Text


class GenerationConfig(Section):
    """Greedy answers: measure, dev metric, generate and evaluate unless they sample."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Prompts per call. Part of the result's identity: another padding is another rounding. A batch
    that does not fit into memory is halved, padded as the whole, counted and reported."""


class MeasureConfig(Section):
    """Where the student's answers of the difficulty pass come from."""

    engine: Literal["local", "server"] = "local"
    """`local`: Ray actors; `server`: an OpenAI-compatible server (vLLM, SGLang, TGI) that has the
    same student. Cross-entropy comes from the actors in both cases."""
    server_url: Text | None = None
    """Base of its API with the version, e.g. `http://127.0.0.1:8000/v1`; no user or password."""
    server_model: Text | None = None
    """The student's name on the server."""
    server_prompt: Literal["token_ids", "text", "messages"] = "token_ids"
    """What is sent: our token ids (exact; vLLM, SGLang) or text to `/completions`, or, with
    `data.template: chat`, messages to `/chat/completions`. The server's count of prompt tokens
    must be ours in each case."""
    server_key_variable: Text | None = None
    """Environment variable that holds the API key; null: none is sent."""
    server_concurrency: Annotated[int, Field(ge=1)] = 16
    """Requests under way at once."""
    server_timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """One request may take this long."""
    server_retries: Annotated[int, Field(ge=0)] = 6
    """New attempts after a timeout, a lost connection, HTTP 429 or 5xx; the wait doubles."""


class GenerateConfig(Section):
    """The teacher's answers to the training prompts as a data set (SeqKD)."""

    output: Text | None = None
    """The data set's file; null: `generated/train.jsonl` in the run directory."""
    do_sample: bool = False
    """Sample instead of greedy."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; not the temperature of the loss."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the sampling."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    """0: off."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Of the sampling."""


class EvaluateConfig(Section):
    """Answers on the test sets."""

    do_sample: bool = False
    """Sample instead of greedy; one pass per seed."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; not the temperature of the loss."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the sampling."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    """6 as published; 0: off."""
    seeds: Annotated[list[int], Field(min_length=1)] = [10]
    """Seeds of the sampled passes; greedy needs one."""
    baselines: bool = False
    """Also evaluate the teacher and the student before training."""
    harness: list[Line] = []
    """Tasks of the lm-evaluation-harness for the export: names, or files and folders of tasks.
    `data.eval_limit` bounds their rows, `generation.batch_size` their batches."""


class ReportConfig(Section):
    """What stands in `report.html`."""

    answers: Annotated[int, Field(ge=0, le=200)] = 100
    """Sampled prompts with the models' answers; they are your data: 0 leaves them out."""


class RayConfig(Section):
    """The actors of measure, generate and evaluate."""

    address: Text | None = None
    """An existing cluster; null starts a local Ray with token authentication, without dashboard."""
    num_actors: Annotated[int, Field(ge=1)] | None = None
    """Model copies; null: one per GPU, or as many as the CPUs allow."""
    cpus_per_actor: Annotated[int, Field(ge=1)] = 1
    """Threads of each actor. Part of the result's identity on CPU."""
    shard_size: Annotated[int, Field(ge=1)] = 128
    """Rows per task, rounded up to whole batches: the unit that is saved and retried."""
    start_timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """No Ray or no actor after this long: exit code 69."""
