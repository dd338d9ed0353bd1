"""What the code of the package may not do, whatever the occasion (instead of bandit's warnings)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pocl_dist"
FILES = sorted(PACKAGE.rglob("*.py"))

# They run code when they load. Ray's own transport is cloudpickle: see SECURITY.md.
FORBIDDEN_MODULES = {
    "pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle",
    "pickletools", "tarfile", "zipfile", "telnetlib", "ftplib", "xmlrpc",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all",
    "shutil.unpack_archive", "tempfile.mktemp", "torch.hub.load", "numpy.fromregex",
    "pandas.read_pickle", "pd.read_pickle", "torch.jit.load", "torch.package.PackageImporter",
}  # fmt: skip
LOADERS = ("_Loader",)  # a yaml.SafeLoader that refuses more: config/yaml_text.py


def _argument(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def _opens_a_model(name: str) -> bool:
    owner, _, method = name.rpartition(".")
    is_model = owner.startswith("Auto") or owner.endswith(("ForCausalLM", "Tokenizer"))
    return method == "from_pretrained" and is_model


def _problem(call: ast.Call) -> str | None:
    name = ast.unparse(call.func)
    if name in FORBIDDEN_CALLS:
        return name
    if name == "torch.load" and _argument(call, "weights_only") != "True":
        return "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and _argument(call, "allow_pickle") not in (None, "False"):
        return f"{name} with allow_pickle"
    if name in ("yaml.load", "yaml.load_all") and _argument(call, "Loader") not in LOADERS:
        return f"{name} without the loader of the config"
    if _argument(call, "shell") not in (None, "False"):
        return f"{name} with shell"
    if _opens_a_model(name):
        wanted = ["trust_remote_code", "local_files_only"]
        if "Model" in name and _argument(call, "gguf_file") is None:
            wanted.append("use_safetensors")
        missing = [argument for argument in wanted if _argument(call, argument) is None]
        if missing:
            return f"{name} without {', '.join(missing)}"
        if _argument(call, "trust_remote_code") == "True":
            return f"{name} trusts remote code"
    return None


def violations(source: str) -> list[str]:
    """Returns one line for each thing in a file's source that is forbidden."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        found += [
            f"line {node.lineno}: import of {name}"  # type: ignore[attr-defined]
            for name in names
            if name.partition(".")[0] in FORBIDDEN_MODULES
        ]
        if isinstance(node, ast.Call) and (problem := _problem(node)):
            found.append(f"line {node.lineno}: {problem}")
    return found


def test_no_file_of_the_package_does_what_is_forbidden() -> None:
    assert len(FILES) > 80
    found = {str(file.relative_to(PACKAGE)): violations(file.read_text()) for file in FILES}
    assert {file: lines for file, lines in found.items() if lines} == {}


def test_the_loader_of_configs_is_a_safe_one() -> None:
    import yaml

    from pocl_dist.config.yaml_text import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from cloudpickle import loads",
        "import joblib.externals",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "eval('1')",
        "exec(code)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "subprocess.run(line, shell=True)",
        "os.system('ls')",
        "AutoModelForCausalLM.from_pretrained(path)",
        "AutoModelForCausalLM.from_pretrained(p, trust_remote_code=False, local_files_only=True)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True, local_files_only=True)",
        "AutoConfig.from_pretrained(path, local_files_only=True)",
    ],
)
def test_what_is_forbidden_is_found(source: str) -> None:
    assert violations(source) != []


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "yaml.load(text, Loader=_Loader)",
        "subprocess.run(words)",
        "AutoTokenizer.from_pretrained(p, trust_remote_code=s.trust, local_files_only=True)",
    ],
)
def test_what_is_allowed_is_not_found(source: str) -> None:
    assert violations(source) == []
