"""Hostile model folders: refused by name, and no code of theirs ever runs.

The payload is a pickle, or a module, that writes a marker file when it is loaded.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pocl_dist.errors import MismatchError, MissingInputError, PoclError, RefusedError
from pocl_dist.models.adapters import find_adapter, merge_adapter
from pocl_dist.models.loading import load_model, load_tokenizer
from pocl_dist.models.sources import ModelFolder, find_model

KEYS = ("models.teacher.path", "models.student.path")
ADAPTER_KEYS = ("models.teacher.adapter", "models.student.adapter")


class Payload:
    """Unpickled, it writes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker))


def zipped(path: Path, marker: Path) -> None:
    """Writes what torch.save writes: a zip with a pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled(marker))


def edit(path: Path, **changes: object) -> None:
    """Sets keys of a JSON file."""
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**value, **changes}))


def header_of(length: int, text: bytes = b'{"a":1}') -> bytes:
    return struct.pack("<Q", length) + text


def code_of(folder: Path, marker: Path) -> None:
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Model: pass\n")


Change = Callable[[Path, Path], object]
AUTO_MAP = {"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
INDEX = "model.safetensors.index.json"


def _index(folder: Path, shard: str) -> None:
    weights = folder / "model.safetensors"
    if weights.exists():
        weights.rename(folder / "model-00001-of-00001.safetensors")
    edit(folder / INDEX, metadata={}, weight_map={"model.norm.weight": shard})


def _only_pickled(folder: Path, marker: Path, name: str = "pytorch_model.bin") -> None:
    (folder / "model.safetensors").unlink()
    zipped(folder / name, marker)


def _link(folder: Path, name: str) -> None:
    shutil.move(folder / name, folder.parent / f"outside-{name}")
    (folder / name).symlink_to(folder.parent / f"outside-{name}")


# name -> (what is done to a good folder, the error, a part of its message)
CORPUS: dict[str, tuple[Change, type[PoclError], str]] = {
    "only a .bin": (_only_pickled, RefusedError, "save_pretrained"),
    "only a .pt": (lambda f, m: _only_pickled(f, m, "model.pt"), RefusedError, "only pickled"),
    "pickle named safetensors": (
        lambda f, m: (f / "model.safetensors").write_bytes(pickled(m)),
        RefusedError, "no safetensors file but pickled weights",
    ),
    "zip named safetensors": (
        lambda f, m: zipped(f / "model.safetensors", m), RefusedError, "pickled weights",
    ),
    "second weights, pickled": (
        lambda f, m: (f / "more.safetensors").write_bytes(pickled(m)), RefusedError, "pickled",
    ),
    "code in config.json": (
        lambda f, m: (code_of(f, m), edit(f / "config.json", auto_map=AUTO_MAP)),
        RefusedError, "Python code of its own",
    ),
    "code in a config inside it": (
        lambda f, m: (code_of(f, m), edit(f / "config.json", text_config={"auto_map": AUTO_MAP})),
        RefusedError, "Python code of its own",
    ),
    "code in tokenizer_config.json": (
        lambda f, m: (
            code_of(f, m),
            edit(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Model", None]}),
        ),
        RefusedError, "Python code of its own",
    ),
    "a kernel from the hub": (
        lambda f, _: edit(f / "config.json", attn_implementation="evil/kernel"),
        RefusedError, "asks for code from the hub",
    ),
    "weights are a link out": (
        lambda f, _: _link(f, "model.safetensors"), RefusedError, "is a link that leaves",
    ),
    "tokenizer is a link out": (
        lambda f, _: _link(f, "tokenizer.json"), RefusedError, "is a link that leaves",
    ),
    "a folder is a link out": (
        lambda f, _: (f / "more").symlink_to("/etc"), RefusedError, "is a link that leaves",
    ),
    "index leaves the folder": (
        lambda f, _: _index(f, "../outside.safetensors"), RefusedError, "leaves",
    ),
    "index is absolute": (
        lambda f, _: _index(f, "/etc/outside.safetensors"), RefusedError, "leaves",
    ),
    "index with NUL": (lambda f, _: _index(f, "a\0.safetensors"), RefusedError, "leaves"),
    "index with a newline": (lambda f, _: _index(f, "a\n.safetensors"), RefusedError, "leaves"),
    "index of a very long name": (
        lambda f, _: _index(f, "x" * 5000 + ".safetensors"), RefusedError, "leaves",
    ),
    "index of pickles": (
        lambda f, m: (_index(f, "w.bin"), zipped(f / "w.bin", m)), RefusedError, "no safetensors",
    ),
    "index is a list": (
        lambda f, _: edit(f / INDEX, weight_map=[1]), MissingInputError, "weight_map",
    ),
    "tokenizer names a private file": (
        lambda f, _: edit(f / "tokenizer_config.json", vocab_file="/etc/passwd"),
        RefusedError, "leaves",
    ),
    "absurd header": (
        lambda f, _: (f / "model.safetensors").write_bytes(header_of(2**63)),
        MissingInputError, "no usable model",
    ),
    "header of 99 MB that is not there": (
        lambda f, _: (f / "model.safetensors").write_bytes(header_of(99_000_000)),
        MissingInputError, "no usable model",
    ),
    "offsets beyond the file": (
        lambda f, _: (f / "model.safetensors").write_bytes(
            header_of(72, b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,9999999]}}'.ljust(72))
        ),
        MissingInputError, "no usable model",
    ),
    "deep config": (
        lambda f, _: (f / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000),
        MissingInputError, "no usable model",
    ),
    "config of another type": (
        lambda f, _: edit(f / "config.json", num_hidden_layers="many"),
        MissingInputError, "expected int, got str",
    ),
    "tokenizer of garbage": (
        lambda f, _: (f / "tokenizer.json").write_bytes(b"\x80\x04\xff{"),
        MissingInputError, "no usable tokenizer",
    ),
    "config in the name of an adapter": (
        lambda f, _: edit(f / "adapter_config.json", peft_type="LORA"),
        MissingInputError, "holds an adapter",
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, tiny_pair: tuple[Path, Path, Path]) -> Path:
    return Path(shutil.copytree(tiny_pair[1], tmp_path / "model"))


def open_model(path: Path, key: str) -> None:
    """Opens a model with all that a run opens of it."""
    found = find_model(str(path), key)
    load_tokenizer(found)
    load_model(found, torch.float32)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", CORPUS)
def test_a_hostile_model_is_refused_and_runs_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, key: str
) -> None:
    monkeypatch.chdir(folder)  # a module beside the weights could be imported
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    change, kind, reason = CORPUS[name]
    marker = tmp_path / "payload-ran"
    change(folder, marker)
    with pytest.raises(kind) as caught:
        open_model(folder, key)
    assert reason in str(caught.value)
    assert type(caught.value) is kind
    assert not marker.exists()


def test_the_payload_of_this_corpus_does_run_where_pickles_are_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    pickle.loads(pickled(marker))
    assert marker.exists()


def test_a_good_folder_opens_and_stale_paths_in_a_tokenizer_do_no_harm(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", special_tokens_map_file="/home/author/x.json")
    (folder / "linked.json").symlink_to("config.json")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04never opened")
    open_model(folder, KEYS[0])


def test_a_snapshot_of_the_hubs_cache_is_made_of_links_and_opens(
    folder: Path, tmp_path: Path
) -> None:
    blobs = tmp_path / "models--me--mine" / "blobs"
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    edit(blobs / "tokenizer_config.json", tokenizer_file="tokenizer.json")
    open_model(snapshot, KEYS[1])
    (snapshot / "more.json").symlink_to("/etc/passwd")
    with pytest.raises(RefusedError, match=r"'more\.json' in .* leaves the folder"):
        open_model(snapshot, KEYS[1])


# --- adapters


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Returns a folder that looks like an adapter of rank 2 for the tiny student."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    edit(
        folder / "adapter_config.json",
        peft_type="LORA", task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj"],
    )  # fmt: skip
    tensors = {
        f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{part}.weight": torch.ones(shape)
        for n in range(2)
        for part, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _adapter_bin(folder: Path, marker: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    zipped(folder / "adapter_model.bin", marker)


ADAPTERS: dict[str, tuple[Change, type[PoclError], str]] = {
    "only a .bin": (_adapter_bin, RefusedError, "only pickled weights"),
    "pickle named safetensors": (
        lambda f, m: (f / "adapter_model.safetensors").write_bytes(pickled(m)),
        RefusedError, "no safetensors file but pickled weights",
    ),
    "absurd header": (
        lambda f, _: (f / "adapter_model.safetensors").write_bytes(header_of(2**62)),
        MissingInputError, "not readable",
    ),
    "weights are a link out": (
        lambda f, _: _link(f, "adapter_model.safetensors"), RefusedError, "a link that leaves",
    ),
    "names a module to import": (
        lambda f, _: edit(f / "adapter_config.json", megatron_config={"a": 1}, megatron_core="x"),
        RefusedError, "megatron_config",
    ),
    "another kind": (
        lambda f, _: edit(f / "adapter_config.json", peft_type="evil"), MismatchError, "type evil",
    ),
    "settings of garbage": (
        lambda f, _: (f / "adapter_config.json").write_bytes(b"\x80\x04."),
        MissingInputError, "no usable adapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", ADAPTER_KEYS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_hostile_adapter_is_refused_and_runs_nothing(
    folder: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    key: str,
) -> None:
    monkeypatch.setenv("POCL_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(adapter)
    code_of(adapter, tmp_path / "payload-ran")
    change, kind, reason = ADAPTERS[name]
    change(adapter, tmp_path / "payload-ran")
    with pytest.raises(kind, match=reason):
        merge_adapter(ModelFolder(folder, "base"), find_adapter(str(adapter), key), key)
    assert not (tmp_path / "payload-ran").exists()
    assert not list((tmp_path / "cache").glob("adapter-*"))


# --- GGUF


def test_a_gguf_file_that_is_cut_or_lies_about_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("POCL_DIST_CACHE", str(tmp_path / "cache"))
    good = tmp_path / "good.gguf"
    writer = gguf.GGUFWriter(good, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", torch.ones(8, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = good.read_bytes()
    hostile = [whole[:cut] for cut in (0, 3, 8, 20, 60, len(whole) // 2, len(whole) - 9)]
    hostile += [whole[:8] + b"\xff" * 8 + whole[16:], whole[:16] + b"\xff" * 8 + whole[24:]]
    hostile += [pickled(tmp_path / "payload-ran"), b"GGUF" + b"\xff" * 99]
    for content in hostile:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        with pytest.raises(MissingInputError, match=r"^models\.teacher\.path: .*no usable GGUF"):
            find_model(str(path), KEYS[0])
    assert not (tmp_path / "payload-ran").exists()
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []
