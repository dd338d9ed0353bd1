"""All that can be known to be wrong before a model is loaded: rows, paths, tokenizers, batch."""

from __future__ import annotations

from pocl_dist.config import Config
from pocl_dist.config.steps import needs_difficulty
from pocl_dist.errors import ConfigError
from pocl_dist.pipeline.cache_inputs import check_top_k
from pocl_dist.pipeline.inputs import (
    read_dev,
    read_eval_sets,
    read_prompts,
    student_source,
    teacher_source,
    write_quarantine,
)
from pocl_dist.pipeline.rank_launcher import check_can_start
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.server_answers import find_server


def check_inputs(config: Config, run: RunDirectory) -> None:
    """Reads all rows, finds the models and compares their tokenizers; raises the first problem.

    Cheap things first: a bad row is known in milliseconds, a tokenizer takes seconds.
    """
    train, dev, tests = read_prompts(config), read_dev(config), read_eval_sets(config)
    num_bad = write_quarantine(run, [train, *([dev] if dev else []), *tests.values()])
    if num_bad:
        print(
            f"WARNING: {num_bad} bad rows left out, listed in {run.root / 'quarantine.jsonl'}",
            flush=True,
        )
    if config.measure.engine == "server" and needs_difficulty(config):
        find_server(config)
    teacher = teacher_source(config, run)
    from pocl_dist.models.loading import (
        check_same_tokenizer,
        load_tokenizer,
        num_layers,
        num_positions,
    )
    from pocl_dist.models.pruning import check_layers

    given = config.models.student
    if teacher is not None:
        _check_positions(config, num_positions(teacher), "models.teacher")
    if given.path is None:
        assert teacher is not None, "checked with the config"
        check_layers(num_layers(teacher), given.init_layers or [])
        encoder_tokenizer, layout = load_tokenizer(teacher), teacher
    else:
        student = student_source(config, run)
        _check_positions(config, num_positions(student), "models.student")
        encoder_tokenizer, layout = load_tokenizer(student), student
        if teacher is not None:
            check_same_tokenizer(load_tokenizer(teacher), encoder_tokenizer)
    if given.lora is not None:
        from pocl_dist.models.lora import check_lora

        check_lora(layout, given.lora)
    from pocl_dist.pipeline.inputs import make_encoder

    check_top_k(config, len(encoder_tokenizer))
    encoder = make_encoder(config, encoder_tokenizer)
    encoder.encode(train.examples[0])  # the template must leave room for a prompt
    check_can_start(config)
    if config.launch.ranks_with == "local":
        _check_ranks(config)


def _check_positions(config: Config, positions: int | None, key: str) -> None:
    """Raises ConfigError when sequences would exceed a model's positions; it would crash."""
    if positions is None:
        return
    longest_prompt = config.data.max_prompt_tokens
    lengths = {
        "data.max_tokens": config.data.max_tokens,
        "data.max_prompt_tokens + generation.max_new_tokens": longest_prompt
        + config.generation.max_new_tokens,
    }
    if config.policy.mode != "off" and config.policy.max_new_tokens is not None:
        name = "data.max_prompt_tokens + policy.max_new_tokens"
        lengths[name] = longest_prompt + config.policy.max_new_tokens
    for name, tokens in lengths.items():
        if tokens > positions:
            raise ConfigError(f"{name}: {tokens} is more than the {positions} positions of {key}")


def _check_ranks(config: Config) -> None:
    """Raises ConfigError when the ranks of this machine cannot share the global batch."""
    import torch

    num_gpus = torch.cuda.device_count()
    ranks = config.engine.world_size or max(1, num_gpus)
    if num_gpus and ranks > num_gpus:
        raise ConfigError(
            f"engine.world_size: {ranks} ranks, but {num_gpus} GPU(s) are visible; lower it, "
            "or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on the CPU"
        )
    if num_gpus and config.engine.zero_stage == 0 and config.engine.dtype is None:
        raise ConfigError(
            "engine.zero_stage: 0 trains in fp32 only, and engine.dtype null means bf16 on a GPU; "
            "set engine.dtype: fp32, or stage 1, 2 or 3"
        )
    if config.engine.global_batch_size % ranks:
        raise ConfigError(
            f"engine.global_batch_size: {config.engine.global_batch_size} rows "
            f"cannot be shared by {ranks} ranks "
            "(one per GPU); use a multiple of them or set engine.world_size"
        )
    if config.engine.dtype == "fp16" and not torch.cuda.is_available():
        raise ConfigError("engine.dtype: 'fp16' is not possible on CPU: use fp32 or bf16")
