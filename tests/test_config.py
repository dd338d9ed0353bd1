"""The config: every shipped file loads, every mistake is told with its dotted key and value."""

from __future__ import annotations

import ast
import itertools
import json
import time
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

import pocl_dist.config
from pocl_dist.config import Config, ScheduleConfig, dump_config, load_config
from pocl_dist.curriculum.stages import make_stages
from pocl_dist.errors import ConfigError, MissingInputError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
MINIMAL = {
    "run_dir": "runs/x",
    "models": {"teacher": {"path": "t"}, "student": {"path": "s"}},
    "data": {"train": "rows.jsonl"},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def complaint(*words: object) -> str:
    """Returns what a user sees of a wrong config."""
    paths = [word for word in words if isinstance(word, Path)]
    with pytest.raises(ConfigError) as caught:
        load_config(paths, [str(word) for word in words if not isinstance(word, Path)])
    assert caught.value.exit_code == 64
    return str(caught.value)


# ---------------------------------------------------------------------------------- what is shipped


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_its_schedules_fill_its_stages(path: Path) -> None:
    config = load_config([path])
    stages = make_stages(1000, config.curriculum, config.engine.global_batch_size)
    assert len(stages) == config.curriculum.num_stages
    assert stages[-1].num_examples == 1000
    assert {stage.temperature for stage in stages[:1]} == {1.0}
    if len(stages) == 4:  # the published recipe, whether written as a table or as a schedule
        assert [round(stage.temperature, 2) for stage in stages] == [1.0, 1.33, 1.67, 2.0]
        assert [round(stage.kd_ratio, 2) for stage in stages] == [0.7, 0.8, 0.9, 1.0]


def test_the_config_of_the_second_family_can_be_layered_over_the_first() -> None:
    first, second = (CONFIGS[0].with_name(f"{name}_dolly.yaml") for name in ("gpt2", "opt"))
    layered = load_config([first, second], ["data.train=mine.jsonl"])
    assert layered.models == load_config([second]).models
    assert layered.data.train == "mine.jsonl"
    assert layered.curriculum == load_config([first]).curriculum


def _keys_without_docstring() -> list[str]:
    sections: list[type[BaseModel]] = [Config]
    for section in sections:  # grows while it is read: sections of sections
        sections += [
            form
            for field in section.model_fields.values()
            for form in (field.annotation, *get_args(field.annotation))
            if isinstance(form, type) and issubclass(form, BaseModel)
        ]
    assert len(sections) > 15
    lacking = []
    for section in sections:
        for name, field in section.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(
                field.annotation, BaseModel
            )
            text = field.annotation.__doc__ if is_section else field.description
            if not text:
                lacking.append(f"{section.__name__}.{name}")
    return lacking


def test_every_key_and_every_section_says_what_it_means() -> None:
    assert _keys_without_docstring() == []


def test_no_default_is_written_anywhere_but_in_the_schema() -> None:
    folder = Path(pocl_dist.config.__file__).parent
    for file in ("load.py", "checks.py", "keys.py"):
        tree = ast.parse((folder / file).read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = {ast.unparse(call.func) for call in calls}
        assert not {name for name in names if name.endswith("Config")}, file


# ----------------------------------------------------------------------------------------- mistakes

# What a user types, and the one line that comes back.
MISTAKES = {
    "engine.zero_stage=4": "engine.zero_stage: 4 is not allowed: must be 0, 1, 2 or 3",
    "engine=3": "engine: 3 is not allowed: must be keys and values (zero_stage, world_size, ",
    "models=": "models: null is not allowed: must be keys and values (teacher, student)",
    "models.teacher=gpt2": "models.teacher: 'gpt2' is not allowed: must be keys and values (path, ",
    "models.teacher.pth=x": "models.teacher.pth: unknown key; did you mean 'path'?",
    "curriculum.num_stage=3": "curriculum.num_stage: unknown key; did you mean 'num_stages'?",
    "lr=1": "lr: unknown key; allowed here: run_dir, seed, models, ",
    "optimizer.learning_rate=fast":
        "optimizer.learning_rate: 'fast' is not allowed: must be a number",
    "optimizer.learning_rate=1e999":
        "optimizer.learning_rate: inf is not allowed: must be a finite number",
    "optimizer.learning_rate=0":
        "optimizer.learning_rate: 0 is not allowed: must be greater than 0",
    "optimizer.betas=[0.9]":
        "optimizer.betas: [0.9] is not allowed: must have at least 2 items, not 1",
    "optimizer.betas=[0.9, 1]": "optimizer.betas.1: 1 is not allowed: must be less than 1",
    "seed=-1": "seed: -1 is not allowed: must be greater than or equal to 0",
    "seed=2.5": "seed: 2.5 is not allowed: must be a whole number",
    "seed='8'": "seed: '8' is not allowed: must be a whole number",
    "seed=1e2": "seed: 100.0 is not allowed: must be a whole number",
    "run_dir=": "run_dir: null is not allowed: must be text",
    "run_dir=''": "run_dir: '' is not allowed: must not be empty",
    'run_dir="a\\0b"': "run_dir: 'a\\x00b' is not allowed: must not hold a NUL",
    "engine.gradient_checkpointing=yes":
        "engine.gradient_checkpointing: 'yes' is not allowed: must be true or false",
    "engine.dtype=fp61": "engine.dtype: 'fp61' is not allowed: must be 'fp32', 'bf16' or 'fp16'",
    "data.eval=test.jsonl": "data.eval: 'test.jsonl' is not allowed: must be a list, written [",
    "data.template=alpca":
        "data.template: 'alpca' is not allowed: one of alpaca, short, chat, or text with ",
    "data.max_prompt_tokens=512": "data.max_prompt_tokens: 512 must be below data.max_tokens 512",
    "data.on_bad_row=skip":
        "data.on_bad_row: 'skip' is not allowed: must be 'fail' or 'quarantine'",
    "loss.name=foward_kl": "loss.name: unknown loss 'foward_kl'; did you mean 'forward_kl'?",
    "loss.kwargs={skew: 0.1}": "loss.kwargs.skew: unknown argument of forward_kl",
    "loss.kwargs={skew: low}": "loss.kwargs.skew: 'low' is not allowed: must be a number",
    "loss.kwargs=3": "loss.kwargs: 3 is not allowed: must be keys and values",
    "curriculum.temperature=hot":
        "curriculum.temperature: 'hot' is not allowed: must be a number, a list with "
    "one number per stage, or {schedule, start, end}",
    "curriculum.temperature=true":
        "curriculum.temperature: true is not allowed: must be a number, a list",
    "curriculum.temperature=":
        "curriculum.temperature: null is not allowed: must be a number, a list",
    "curriculum.temperature=0":
        "curriculum.temperature: 0.0 is not allowed: must lie in [0.001, 1000]",
    "curriculum.temperature=[1, a, 2, 2]":
        "curriculum.temperature.1: 'a' is not allowed: must be a number",
    "curriculum.temperature=[1, 2]": "curriculum.temperature: [1.0, 2.0] has 2 values for 4 stages",
    "curriculum.temperature=[]":
        "curriculum.temperature: [] is not allowed: must have at least 1 item",
    "curriculum.temperature={schedule: liner, start: 1}":
        "curriculum.temperature.schedule: 'liner' is not allowed: "
    "must be 'linear', 'cosine' or 'constant'",
    "curriculum.temperature={schedule: linear, start: 1}":
        "curriculum.temperature.end: is required with schedule",
    "curriculum.temperature={schedule: linear, end: 1}":
        "curriculum.temperature.start: is required",
    "curriculum.temperature={schedule: constant, start: 1, strat: 2}":
        "curriculum.temperature.strat: unknown key; "
    "did you mean 'start'?",
    "curriculum.kd_ratio=1.5": "curriculum.kd_ratio: 1.5 is not allowed: must lie in [0, 1]",
    "curriculum.kd_ratio={schedule: linear, start: 0, end: x}":
        "curriculum.kd_ratio.end: 'x' is not allowed: must be ",
    "curriculum.advance=converged": "curriculum.advance: 'converged' needs data.dev",
    "export.select=best_dev": "export.select: 'best_dev' needs data.dev",
    "engine.world_size=3":
        "engine.global_batch_size: 64 rows cannot be shared by engine.world_size 3 ranks",
    "optimizer.min_learning_rate=1":
        "optimizer.min_learning_rate: 1.0 is above optimizer.learning_rate 0.0001",
    "engine.zero_options={stage: 2}":
        "engine.zero_options.stage: is set by its own key under engine",
    "models.student.init_layers=[0, 1]": "models.student: path and init_layers exclude each other",
    "models.student.path=": "models.student.path: is required (or init_layers, ",
    "a..b=3": "'a..b=3': an override is section.key=value",
    "=3": "'=3': an override is section.key=value",
    "engine.zero_stage=[1":
        "engine.zero_stage: not valid YAML: while parsing a flow sequence expected ",
}  # fmt: skip


@pytest.mark.parametrize("word", MISTAKES)
def test_a_mistake_is_told_in_one_line_that_names_key_value_and_what_is_allowed(
    base: Path, word: str
) -> None:
    message = complaint(base, word)
    assert message.startswith(MISTAKES[word])
    assert "\n" not in message
    assert "Config." not in message and "Input should" not in message


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["engine.zero_stage=0", "engine.dtype=bf16"], "engine.zero_stage"),
        (["engine.zero_stage=2", "engine.offload_param=cpu"], "engine.offload_param"),
        (["engine.zero_stage=0", "engine.offload_optimizer=cpu"], "engine.offload_optimizer"),
        (
            ["models.student.path=", "models.student.init_layers=[1, 0]"],
            "models.student.init_layers",
        ),
        (
            ["models.teacher=", "models.student.path=", "models.student.init_layers=[0]"],
            "models.student.init_layers",
        ),
        (["curriculum.num_stages=2", "curriculum.kd_ratio=[0.5]"], "curriculum.kd_ratio"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(
    base: Path, words: list[str], key: str
) -> None:
    assert complaint(base, *words).startswith(f"{key}: ")


def test_all_mistakes_of_a_file_are_told_at_once(base: Path) -> None:
    lines = complaint(base, "seed=-1", "engine.zero_stage=7", "data.trian=x").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["seed", "data.trian", "engine.zero_stage"]


def test_a_required_key_that_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: x\nmodels: {teacher: null}\n")
    assert complaint(path) == "models.student: is required\ndata: is required"


def test_a_value_that_fills_the_screen_or_holds_terminal_codes_is_cut_and_escaped(
    base: Path,
) -> None:
    message = complaint(base, "engine.dtype=" + json.dumps("\x1b[31m" + "x" * 5000))
    assert len(message) < 250 and "\x1b" not in message
    message = complaint(base, 'engine={"\\e[31m": 1}')
    assert "\x1b" not in message


# --------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-1.5e+3", -1500.0),
        ("7", 7), ("+7", 7), ("0", 0),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("off", "off"), ("yes", "yes"), ("on", "on"), ("n", "n"), ("017", "017"), ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("1:30", "1:30"), ("2020-01-01", "2020-01-01"), (".inf", ".inf"),
        ("<<", "<<"), ("'1e-4'", "1e-4"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2_and_anything_else_is_text(
    base: Path, text: str, value: object
) -> None:
    config = load_config([base], [f"engine.zero_options.x={text}"])
    found = config.engine.zero_options["x"]
    assert found == value and type(found) is type(value)


BROKEN_FILES = {
    "alias": (b"a: &x [1]\nb: *x\n", "aliases are not allowed (line 2, column 4)"),
    "merge": (b"a: &x {b: 1}\nc:\n  <<: *x\n", "aliases are not allowed"),
    "duplicate": (
        b"seed: 1\nrun_dir: x\nseed: 2\n",
        "key 'seed' is given twice (line 3, column 1)",
    ),
    "nested duplicate": (b"engine:\n  dtype: fp32\n  dtype: bf16\n", "key 'dtype' is given twice"),
    "tag": (b"seed: !!int '3'\n", "the tag tag:yaml.org,2002:int is not allowed"),
    "python tag": (b"seed: !!python/object/apply:os.system ['true']\n", "is not allowed"),
    "key that is a list": (b"? [a]\n: 1\n", "a key must be a word"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "found another document"),
    "open bracket": (b"engine: {dtype: fp32\n", "not valid YAML"),
    "tab": (b"engine:\n\tdtype: fp32\n", "not valid YAML"),
    "NUL": (b"seed: 1\0\n", "not valid YAML"),
    "deep": (b"[" * 4000, "nested too deeply"),
    "long number": (b"seed: " + b"9" * 5000, "not valid YAML"),
    "not UTF-8": (b"run_dir: caf\xe9\n", "not UTF-8 at byte 12"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "not UTF-8 at byte 0"),
    "a list": (b"- seed\n- 3\n", "holds list, expected keys and values"),
    "empty": (b"# nothing\n", "holds NoneType, expected keys and values"),
    "text": (b"seed=3", "holds str, expected keys and values"),
    "too large": (b"# " + b"x" * (1 << 20), "larger than 1048576 bytes"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_file_that_is_no_config_is_refused_quickly_and_by_name(tmp_path: Path, name: str) -> None:
    content, reason = BROKEN_FILES[name]
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    started = time.process_time()
    message = complaint(path)
    assert time.process_time() - started < 2
    assert message.startswith(f"{path}: ") and reason in message


def test_billion_laughs_are_refused_in_less_than_a_second(tmp_path: Path) -> None:
    path = tmp_path / "laughs.yaml"
    names = "abcdefghi"
    lines = ["a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for before, name in itertools.pairwise(names):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    path.write_text("\n".join(lines))
    started = time.process_time()
    assert "aliases are not allowed" in complaint(path)
    assert time.process_time() - started < 1


def test_a_file_that_is_not_there_is_missing_input_with_the_path_looked_at(tmp_path: Path) -> None:
    for path in ("nowhere.yaml", "configs/nowhere.yaml", str(tmp_path)):
        with pytest.raises(MissingInputError, match="looked at /") as caught:
            load_config([path])
        assert path in str(caught.value)


# ----------------------------------------------------------------------------------------- layering


def test_layers_and_overrides_apply_from_left_to_right(base: Path, tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("engine: {global_batch_size: 16}\nseed: 1\n")
    config = load_config([base, over], ["engine.micro_batch_size=2", "seed=2", "seed=3"])
    assert (config.engine.global_batch_size, config.engine.micro_batch_size) == (16, 2)
    assert config.seed == 3
    assert config.models == load_config([base]).models


def test_an_override_without_value_is_null_and_one_in_brackets_a_list(base: Path) -> None:
    config = load_config([base], ["data.limit=5", "data.limit=", "data.eval=[a.jsonl, b.jsonl]"])
    assert config.data.limit is None
    assert config.data.eval == ["a.jsonl", "b.jsonl"]
    assert load_config([base], ["models.teacher="]).models.teacher is None


def test_a_schedule_replaces_a_number_or_a_list_and_the_other_way_round(
    base: Path, tmp_path: Path
) -> None:
    schedule, number, table = (
        tmp_path / f"{name}.yaml" for name in ("schedule", "number", "table")
    )
    schedule.write_text("curriculum: {temperature: {schedule: cosine, start: 1, end: 3}}\n")
    number.write_text("curriculum: {temperature: 2}\n")
    table.write_text("curriculum: {temperature: [1, 2, 3, 4]}\n")
    wanted = ScheduleConfig(schedule="cosine", start=1, end=3)
    for earlier in (number, table):
        assert load_config([base, earlier, schedule]).curriculum.temperature == wanted
        assert load_config([base, schedule, earlier]).curriculum.temperature in (2.0, [1, 2, 3, 4])


def test_a_later_schedule_does_not_keep_the_end_of_the_earlier_one(base: Path) -> None:
    first = "curriculum.temperature={schedule: linear, start: 1, end: 3}"
    second = "curriculum.temperature={schedule: constant, start: 2}"
    wanted = ScheduleConfig(schedule="constant", start=2)
    assert load_config([base], [first, second]).curriculum.temperature == wanted


def test_one_key_of_a_schedule_can_be_changed_alone(base: Path) -> None:
    first = "curriculum.temperature={schedule: linear, start: 1, end: 3}"
    changed = load_config([base], [first, "curriculum.temperature.schedule=cosine"])
    assert changed.curriculum.temperature == ScheduleConfig(schedule="cosine", start=1, end=3)
    changed = load_config([base], [first, "curriculum.temperature.end=4"])
    assert changed.curriculum.temperature == ScheduleConfig(schedule="linear", start=1, end=4)


def test_an_empty_mapping_drops_what_a_lower_layer_wrote(base: Path) -> None:
    skewed = ["loss.name=skew_forward_kl", "loss.kwargs.skew=0.2"]
    assert load_config([base], skewed).loss.kwargs == {"skew": 0.2}
    plain = load_config([base], [*skewed, "loss.name=forward_kl", "loss.kwargs={}"])
    assert plain.loss.kwargs == {}


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_is_dumped_is_loaded_back_to_the_same_config(path: Path, tmp_path: Path) -> None:
    config = load_config([path])
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config([tmp_path / "dumped.yaml"]) == config


TEXTS = ["1e4", "017", "off", "null", "~", "<<", "=", "1:30", ".inf", "true"]
TEXTS += ["a: b", "# x", " x ", "é ü", "\u2028", "{}"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_looks_like_something_else_survives_the_dump(
    base: Path, tmp_path: Path, text: str
) -> None:
    config = load_config(
        [base], [f"run_dir={json.dumps(text)}", "optimizer.min_learning_rate=1e-22"]
    )
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config([tmp_path / "dumped.yaml"]) == config
    assert config.run_dir == text


def test_a_config_cannot_be_changed_after_it_is_loaded(base: Path) -> None:
    config = load_config([base])
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.engine.dtype = "bf16"  # type: ignore[misc]
    assert isinstance(config, Config)
