"""Rules that keep the house standing: import floors, small files, no unsafe loading."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "llada_mega").rglob("*.py"), *(ROOT / "kernels" / "llada_kernels").rglob("*.py")])

# From the ground up; an import never goes up, and packages on one floor do not know each other.
FLOORS = (
    ("llada_kernels",),
    ("errors",),
    ("ranks",),
    ("diffusion",),
    ("config",),
    ("data", "parallel"),
    ("models",),
    ("checkpoint",),
    ("inference",),
    ("evaluation",),
    ("training",),
    ("reporting", "planning"),
    ("api",),
    ("quickstart",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
# `llada_mega/__init__.py` hands out the public names of `api` when they are first used.
EXEMPT = {("llada_mega", "api")}


def package_of(module: str) -> str:
    """``llada_mega.data.batch`` -> ``data``; ``llada_kernels.backends.cpu`` -> ``llada_kernels``."""
    parts = module.split(".")
    return parts[1] if parts[0] == "llada_mega" and len(parts) > 1 else parts[0]


def module_name(path: Path) -> str:
    base = ROOT / "kernels" if "llada_kernels" in path.parts else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and module of every import in the file, those inside functions and of other ways to import included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def upward_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one file, one line each."""
    own = package_of(module)
    problems = []
    for line, target in imports(ast.parse(source), module, is_package):
        root = target.split(".")[0]
        if root not in ("llada_mega", "llada_kernels") or target in ("llada_mega", "llada_mega.__version__"):
            continue
        other = package_of(target)
        if other == own or (own, other) in EXEMPT:
            continue
        if own not in FLOOR_OF or other not in FLOOR_OF:
            problems.append(
                f"line {line}: {own if own not in FLOOR_OF else other} stands on no floor of {Path(__file__).name}"
            )
        elif FLOOR_OF[other] >= FLOOR_OF[own] or (own == "llada_kernels"):
            problems.append(f"line {line}: {own} must not import {target}")
    return list(dict.fromkeys(problems))


def test_imports_never_go_up() -> None:
    found = {}
    for path in SOURCES:
        problems = upward_imports(path.read_text("utf-8"), module_name(path), path.name == "__init__.py")
        if problems:
            found[str(path.relative_to(ROOT))] = problems
    assert not found


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from llada_mega.training import run", "llada_mega.models.model"),
        ("def f():\n    import llada_mega.cli", "llada_mega.data.build"),
        ("from llada_mega.parallel import groups", "llada_mega.data.loader"),
        ("from ..models import provider", "llada_mega.config.schema"),
        ("import importlib\nimportlib.import_module('llada_mega.checkpoint')", "llada_mega.models.model"),
        ("from llada_mega import training", "llada_mega.models.model"),
        ("from llada_mega.errors import ConfigError", "llada_kernels.backends.cpu"),
        ("from llada_mega.elsewhere import x", "llada_mega.cli"),
    ],
)
def test_the_floor_check_sees_every_kind_of_import(source: str, module: str) -> None:
    assert upward_imports(source, module)


def test_the_floor_check_allows_what_goes_down() -> None:
    source = "from llada_mega.models import build_model\nfrom ..errors import ConfigError\nimport llada_kernels"
    assert upward_imports(source, "llada_mega.training.run") == []


def test_files_stay_small() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    assert {name: count for name, count in lines.items() if count > 600} == {}
    assert statistics.median(lines.values()) < 200


def unsafe_loading(source: str) -> list[str]:
    """Uses of pickle, of torch.load without weights_only=True, and of remote code, one line each."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if any(
                name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal")
                for name in names
            ):
                problems.append(f"line {node.lineno}: pickle")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name.endswith("torch.load") and arguments.get("weights_only") != "True":
            problems.append(f"line {node.lineno}: torch.load needs weights_only=True")
        if arguments.get("weights_only", "True") != "True":
            problems.append(f"line {node.lineno}: weights_only must be True")
        if "trust_remote_code" in arguments and arguments["trust_remote_code"] != "False":
            problems.append(f"line {node.lineno}: trust_remote_code")
        if arguments.get("allow_pickle", "False") != "False" or (
            name in ("np.load", "numpy.load") and "allow_pickle" not in arguments
        ):
            problems.append(f"line {node.lineno}: numpy files need allow_pickle=False")
        if name == "torch.save":
            problems.append(f"line {node.lineno}: torch.save writes a pickle; use safetensors")
        if name in ("yaml.load", "yaml.unsafe_load", "eval", "exec"):
            problems.append(f"line {node.lineno}: {name} runs code from data")
    return problems


def test_nothing_loads_code_from_data() -> None:
    found = {str(path.relative_to(ROOT)): unsafe_loading(path.read_text("utf-8")) for path in SOURCES}
    assert {name: problems for name, problems in found.items() if problems} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "load(path, weights_only=flag)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "np.load(path)",
        "torch.save(model, path)",
        "yaml.load(text, Loader=yaml.Loader)",
    ],
)
def test_the_loading_check_sees(source: str) -> None:
    assert unsafe_loading(source)


def test_no_generated_or_private_files_are_tracked() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    unwanted = re.compile(r"(^|/)(__pycache__|\.venv|runs|\.env|.*\.(pyc|bin|idx|safetensors|gguf|pem|key))(/|$)")
    assert [name for name in listed.stdout.splitlines() if unwanted.search(name)] == []
