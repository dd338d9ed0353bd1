"""A model's tokenizer through the `tokenizers` library alone: 0.1 s, where transformers takes 5.

It gives the vocabulary and the eos id that transformers gives, and its ids of a text but for the
rare class that changes what its `tokenizer.json` says: good for checks and statistics. Training
uses transformers' own.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pocl_dist.errors import MissingInputError
from pocl_dist.files import JSONValue, read_json
from pocl_dist.models.chat_template import render_chat
from pocl_dist.models.gguf_header import GGUFHeader, read_gguf_header
from pocl_dist.models.header import transformers_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_CONTROL, _USER_DEFINED = 3, 4  # types of GGUF tokens that are found in a text as a whole


class UnreadableTokenizerError(Exception):
    """The tokenizer is kept in a form that only transformers reads; says which."""


@dataclass(frozen=True)
class PlainTokenizer:
    """What an encoder and the comparison of vocabularies ask of a tokenizer."""

    tokenizer: Tokenizer
    name_or_path: str
    special_tokens: Mapping[str, str]
    chat_template: str | None

    @property
    def eos_token_id(self) -> int | None:
        """Returns the id of the token that ends an answer, None without one."""
        eos = self.special_tokens.get("eos_token")
        return None if eos is None else self.tokenizer.token_to_id(eos)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """Returns {token: id}, added tokens included."""
        return dict(self.tokenizer.get_vocab(with_added_tokens=True))

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, verbose: bool = False
    ) -> dict[str, list[int]]:
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return {"input_ids": list(ids)}

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
    ) -> str:
        """Returns the messages as the model reads them; only what an encoder needs is there."""
        assert add_generation_prompt and not tokenize and self.chat_template is not None
        return render_chat(self.chat_template, conversation, self.special_tokens)


def read_tokenizer(path: Path, key: str, model_type: str | None = None) -> PlainTokenizer:
    """Returns the tokenizer of a model folder or GGUF file, named by the config key `key`.

    Raises MissingInputError (66) when there is none or it is damaged, UnreadableTokenizerError for
    a form that needs transformers.
    """
    if path.is_file():
        return _from_gguf(read_gguf_header(path, key), path)
    try:
        settings = _settings(path)
    except ValueError as error:
        raise MissingInputError(f"{key}: no usable tokenizer: {error}") from error
    tokenizer = _backend(path, key)
    special = {
        name: token
        for name in SPECIAL_TOKENS
        if (token := _token(settings.get(name, _default(settings, model_type, name)))) is not None
    }
    unknown = [
        token
        for token in dict.fromkeys(special.values())
        if tokenizer.token_to_id(token) is None and settings.get("tokenizer_class") is not None
    ]
    tokenizer.add_special_tokens(unknown)
    return PlainTokenizer(tokenizer, str(path), special, _chat_template(path, settings))


def _backend(folder: Path, key: str) -> Tokenizer:
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    file = folder / "tokenizer.json"
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        if vocabulary.is_file() and merges.is_file():
            byte_level = ByteLevelBPETokenizer.from_file(str(vocabulary), str(merges))
            return cast("Tokenizer", byte_level._tokenizer)
    except Exception as error:  # the Rust reader raises plain Exception
        raise MissingInputError(
            f"{key}: no usable tokenizer in {folder}: {' '.join(str(error).split())}"
        ) from error
    others = [name for name in ("tokenizer.model", "vocab.txt") if (folder / name).is_file()]
    if others:
        raise UnreadableTokenizerError(
            f"{folder} has no tokenizer.json, and only transformers reads {others[0]}"
        )
    raise MissingInputError(f"{key}: no usable tokenizer in {folder}: no tokenizer.json")


def _settings(folder: Path) -> dict[str, JSONValue]:
    found: dict[str, JSONValue] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the later one wins
        if (folder / name).is_file():
            found |= {k: v for k, v in read_json(folder / name).items() if v is not None}
    return found


def _token(value: JSONValue) -> str | None:
    """Returns the text of a token that is given as text or as an object with its `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _default(settings: Mapping[str, JSONValue], model_type: str | None, name: str) -> str | None:
    """Returns what the model's tokenizer class has where the files say nothing (old GPT-2s)."""
    generic = ("PreTrainedTokenizerFast", "TokenizersBackend")
    if model_type is None or not model_type.isidentifier():
        return None
    if settings.get("tokenizer_class") in generic:
        return None
    source = transformers_file(f"models/{model_type}/tokenization_{model_type}.py")
    if source is None and model_type == "opt":
        source = transformers_file("models/gpt2/tokenization_gpt2.py")
    if source is None:
        return None
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return _argument_default(node, name)
    return None


def _argument_default(function: ast.FunctionDef, name: str) -> str | None:
    arguments = function.args.args
    defaults = function.args.defaults
    pairs = zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True)
    for argument, default in pairs:
        if argument.arg == name and isinstance(default, ast.Constant):
            return default.value if isinstance(default.value, str) else None
    return None


def _chat_template(folder: Path, settings: Mapping[str, JSONValue]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    given = settings.get("chat_template")
    if isinstance(given, list):  # several of them, by name
        named = {str(e.get("name")): e.get("template") for e in given if isinstance(e, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else None


def _from_gguf(header: GGUFHeader, path: Path) -> PlainTokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    values = header.values
    tokens, merges = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.merges")
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise UnreadableTokenizerError(
            f"{path} keeps a {values.get('tokenizer.ggml.model')} tokenizer, which only "
            "transformers reads"
        )
    vocabulary = {str(token): index for index, token in enumerate(tokens)}
    pairs = [cast("tuple[str, str]", tuple(str(merge).split(" ", 1))) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    types = values.get("tokenizer.ggml.token_type")
    for token, kind in zip(tokens, types if isinstance(types, list) else [], strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            added = AddedToken(str(token), normalized=False, special=kind == _CONTROL)
            tokenizer.add_special_tokens([added])
    special = {}
    for name, entry in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        index = values.get(f"tokenizer.ggml.{entry}_token_id")
        if isinstance(index, int) and index < len(tokens):
            special[name] = str(tokens[index])
    template = values.get("tokenizer.chat_template")
    chat = template if isinstance(template, str) else None
    return PlainTokenizer(tokenizer, str(path), special, chat)
