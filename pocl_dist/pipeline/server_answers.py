"""The student's answers from a server, for `measure.engine: server`; saved shard by shard.

difficulty/answers-00017.json   {example id: answer}, sealed; the number is of its first batch
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pocl_dist.config import Config
from pocl_dist.data.sources import Rows
from pocl_dist.difficulty.server import Server, ServerPrompt, ask, check_reachable
from pocl_dist.difficulty.server_pool import ask_all
from pocl_dist.difficulty.work import WorkShard
from pocl_dist.display.output import say
from pocl_dist.display.rows import RowProgress
from pocl_dist.errors import ConfigError, MismatchError, StoppedError
from pocl_dist.pipeline.answer_files import AnswerFiles
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import EncodedExample, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pocl_dist.pipeline.stop_request import StopRequest


def find_server(config: Config) -> Server:
    """Returns the server that the config names.

    Raises ConfigError (64) when its key is not in the environment, or refused; UnavailableError
    (69) when nothing answers.
    """
    options = config.measure
    assert options.server_url is not None and options.server_model is not None, "checked"
    variable, key = options.server_key_variable, None
    if variable is not None:
        key = os.environ.get(variable, "").strip()
        if not key:
            raise ConfigError(
                f"measure.server_key_variable: {variable} is not set in the environment"
            )
    server = Server(
        options.server_url,
        options.server_model,
        options.server_timeout_seconds,
        options.server_retries,
        key,
    )
    check_reachable(server)
    return server


def server_answers(
    config: Config, run: RunDirectory, shards: Mapping[str, WorkShard], rows: Rows, server: Server
) -> dict[str, str]:
    """Returns {example id: the server's answer} of all shards; asks for what no file holds.

    1. turn prompts into what the server takes; 2. ask for one token, which tells a wrong model
    name, a form of prompt it does not take, or drift; 3. ask for the rest, a shard at a time.
    All rows and answers are held in memory. Raises StoppedError (75) on request; the shards that
    are complete are saved.
    """
    from pocl_dist.models.loading import load_tokenizer
    from pocl_dist.pipeline.actor_pass import stop_request
    from pocl_dist.pipeline.inputs import student_source

    known = _files(run).read()
    unknown: dict[str, list[EncodedExample]] = {}
    for name, shard in shards.items():
        of_shard = [row for batch in shard.batches for row in batch.examples]
        if any(row.example_id not in known for row in of_shard):
            unknown[name] = of_shard
    if unknown:
        examples = rows.by_id()
        tokenizer = load_tokenizer(student_source(config, run))
        prompts = {
            name: [
                make_prompt(config, examples[row.example_id], row, tokenizer) for row in of_shard
            ]
            for name, of_shard in unknown.items()
        }
        ask(server, next(iter(prompts.values()))[0], 1)
        with stop_request(run, config.run.max_wallclock_minutes) as stop:
            known |= _ask_all(config, run, stop, server, prompts)
    return known


def _files(run: RunDirectory) -> AnswerFiles:
    return AnswerFiles(run.difficulty, "answers")


def make_prompt(
    config: Config, example: Example, encoded: EncodedExample, tokenizer: PreTrainedTokenizerBase
) -> ServerPrompt:
    """Returns a row's prompt as `measure.server_prompt` says.

    Raises MismatchError (78) for a row whose tokens neither text nor messages can stand for.
    """
    form, ids = config.measure.server_prompt, encoded.prompt_ids
    tokens = list(ids)
    if form == "token_ids":
        return ServerPrompt(example.example_id, tokens, ids)
    if form == "messages":
        from pocl_dist.data.encoding import chat_messages

        if encoded.is_prompt_cut:
            raise MismatchError(
                f"row {example.example_id!r}: its prompt is cut to data.max_prompt_tokens "
                f"{config.data.max_prompt_tokens}, which messages cannot be; raise it, or use "
                "measure.server_prompt token_ids or text"
            )
        return ServerPrompt(example.example_id, list(chat_messages(example)), ids)
    # Servers add the special tokens that open a text themselves.
    for text in (tokenizer.decode(tokens), tokenizer.decode(tokens, skip_special_tokens=True)):
        if tuple(tokenizer(text)["input_ids"]) == ids:
            return ServerPrompt(example.example_id, str(text), ids)
    again = len(tokenizer(tokenizer.decode(tokens))["input_ids"])
    raise MismatchError(
        f"row {example.example_id!r}: its prompt has {len(ids)} tokens, its text gives other ones "
        f"({again}) when it is encoded again; use measure.server_prompt token_ids"
    )


def _ask_all(
    config: Config,
    run: RunDirectory,
    stop: StopRequest,
    server: Server,
    prompts: Mapping[str, Sequence[ServerPrompt]],
) -> dict[str, str]:
    """Returns {example id: answer} of all shards; each is saved as soon as it is complete."""
    num_rows = sum(len(of_shard) for of_shard in prompts.values())
    say(f"measure: {num_rows} rows answered by {server.model} at {server.url}")

    def raise_if_asked() -> None:
        if stop.is_asked():
            raise StoppedError(
                "stopped on request; what is finished is saved, the same command goes on"
            )

    answers: dict[str, str] = {}
    shard_of = {p.example_id: name for name, of_shard in prompts.items() for p in of_shard}
    num_open = {name: len(of_shard) for name, of_shard in prompts.items()}
    in_order = [prompt for of_shard in prompts.values() for prompt in of_shard]
    bounds = config.generation.max_new_tokens, config.measure.server_concurrency
    with RowProgress("measure: server", num_rows) as progress:
        for prompt, answer in ask_all(server, in_order, *bounds, raise_if_asked):
            answers[prompt.example_id] = answer
            progress.advance(1)
            shard_name = shard_of[prompt.example_id]
            num_open[shard_name] -= 1
            if not num_open[shard_name]:
                _save(run, shard_name, prompts[shard_name], answers)
    return answers


def _save(
    run: RunDirectory, shard_name: str, prompts: Sequence[ServerPrompt], answers: Mapping[str, str]
) -> None:
    name = shard_name.replace("shard", "answers")
    _files(run).write(name, {prompt.example_id: answers[prompt.example_id] for prompt in prompts})
