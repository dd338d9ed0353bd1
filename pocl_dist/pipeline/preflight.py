"""All that can be known to be wrong before a model is loaded: rows, paths, tokenizers, batch."""

from __future__ import annotations

from pocl_dist.config import Config
from pocl_dist.config.steps import needs_difficulty
from pocl_dist.display.output import warn
from pocl_dist.distributed.rank_rules import check_ranks
from pocl_dist.models.config_fit import check_layers, check_positions, check_top_k
from pocl_dist.models.tokenizer_checks import check_head_rows, check_same_tokenizer
from pocl_dist.pipeline.harness import check_harness
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
from pocl_dist.trackers.registry import wanted_trackers


def check_inputs(config: Config, run: RunDirectory) -> None:
    """Reads all rows, finds the models and compares their tokenizers; raises the first problem.

    Cheap things first: a bad row is known in milliseconds, a tokenizer takes seconds.
    """
    wanted_trackers(config.log)
    check_harness(config)
    train, dev, tests = read_prompts(config), read_dev(config), read_eval_sets(config)
    num_bad = write_quarantine(run, [train, *([dev] if dev else []), *tests.values()])
    if num_bad:
        warn(f"{num_bad} bad rows left out, listed in {run.root / 'quarantine.jsonl'}")
    if config.measure.engine == "server" and needs_difficulty(config):
        find_server(config)
    teacher = teacher_source(config, run)
    from pocl_dist.models.loading import (
        load_tokenizer,
        num_layers,
        num_positions,
        vocabulary_rows,
    )

    given = config.models.student
    if teacher is not None:
        check_positions(config, num_positions(teacher), "models.teacher")
    if given.path is None:
        assert teacher is not None, "checked with the config"
        check_layers(num_layers(teacher), given.init_layers or [])
        encoder_tokenizer, layout = load_tokenizer(teacher), teacher
    else:
        student = student_source(config, run)
        check_positions(config, num_positions(student), "models.student")
        encoder_tokenizer, layout = load_tokenizer(student), student
        if teacher is not None:
            check_same_tokenizer(load_tokenizer(teacher), encoder_tokenizer)
    what = "models.teacher" if given.path is None else "models.student"
    check_head_rows(vocabulary_rows(layout), len(encoder_tokenizer), what)
    if given.lora is not None:
        from pocl_dist.models.lora import check_lora

        check_lora(layout, given.lora)
    from pocl_dist.pipeline.inputs import make_encoder

    check_top_k(config, len(encoder_tokenizer))
    encoder = make_encoder(config, encoder_tokenizer)
    encoder.encode(train.examples[0])  # the template must leave room for a prompt
    check_can_start(config)
    if config.launch.ranks_with == "local":
        import torch

        check_ranks(config, torch.cuda.device_count())
