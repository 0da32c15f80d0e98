"""The container's recipe: pins equal constraints.txt, hadolint accepts it, the extra `gpu` resolves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
ARGUMENTS = dict(re.findall(r"^ARG (\w+)=(.+)$", DOCKERFILE, flags=re.MULTILINE))
PINNED = {
    "MEGATRON_CORE": "megatron-core",
    "TRANSFORMER_ENGINE": "transformer-engine",
    "CUDNN_FRONTEND": "nvidia-cudnn-frontend",
    "CUTLASS_DSL": "nvidia-cutlass-dsl",
}
OTHER_ARGUMENTS = {"BASE", "CPU_BASE", "TORCH_INDEX", "APEX", "CUDA_ARCHITECTURES", "MAX_JOBS"}


def normal(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints(python: tuple[int, int]) -> dict[str, str]:
    """Pinned versions under a version of Python."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        found = re.fullmatch(r"([\w.-]+)==([^;\s]+)(?:; python_version (<|>=) \"3\.12\")?", line)
        if found is not None and (found[3] is None or (found[3] == ">=") == (python >= (3, 12))):
            pins[normal(found[1])] = found[2]
    return pins


def tool(name: str) -> str:
    """A program of the extra `dev`; skips where it is not installed."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}") or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def stage(name: str) -> str:
    """The instructions of one build stage."""
    _, _, rest = DOCKERFILE.partition(f" AS {name}\n")
    assert rest, f"there is no stage {name}"
    return rest.partition("\nFROM ")[0]


def test_pins_equal_constraints() -> None:
    pins = constraints((3, 12))
    assert {name: ARGUMENTS[name] for name in PINNED} == {name: pins[package] for name, package in PINNED.items()}
    assert set(ARGUMENTS) == set(PINNED) | OTHER_ARGUMENTS  # a new one is a pin, or is named here
    for name in ("TRANSFORMER_ENGINE", "MEGATRON_CORE", "CUDNN_FRONTEND", "CUTLASS_DSL", "APEX"):
        assert f"${{{name}}}" in stage("gpu-build"), f"ARG {name} is not used"


def test_transformer_engines_parts_have_one_version() -> None:
    pins = constraints((3, 12))
    parts = ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch")
    assert len({pins[part] for part in parts}) == 1


def test_bases_are_tags() -> None:
    for name in ("BASE", "CPU_BASE"):
        assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", ARGUMENTS[name]), f"{name}={ARGUMENTS[name]} names no version"


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_images_are_small_unprivileged_and_watched(name: str) -> None:
    instructions = stage(name)
    user = re.search(r"^USER (\d+)$", instructions, flags=re.MULTILINE)
    assert user is not None, "USER must be a number, which Kubernetes can check"
    assert int(user[1]) > 0
    assert "HEALTHCHECK" in instructions
    assert '"llada-mega", "doctor"' in instructions
    assert len(re.findall(r"^(?:RUN|COPY|ADD) ", instructions, flags=re.MULTILINE)) <= 2
    assert not re.search(r"^ARG|pip install|apt-get", instructions, flags=re.MULTILINE)


def test_the_health_check_leaves_gpus_to_the_training() -> None:
    """The command itself, as far as it can be run here: on a healthy machine without GPUs it finds nothing wrong."""
    check = re.search(r"^HEALTHCHECK .*CMD (\[.*\])$", stage("gpu"), flags=re.MULTILINE)
    assert check is not None
    command = json.loads(check[1])
    assert command[:3] == ["env", "CUDA_VISIBLE_DEVICES=", "llada-mega"]
    asked = f"import sys, torch; from llada_mega.cli import main; status = main({command[3:]!r})"
    program = [*command[:2], sys.executable, "-c", f"{asked}; sys.exit(status or torch.cuda.is_initialized())"]
    ended = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_build_sees_what_the_package_is_made_of() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert all((ROOT / path).exists() for path in allowed)
    assert {"configs", "constraints.txt", "pyproject.toml", "setup.py", "llada_mega", "README.md", "LICENSE"} <= allowed
    assert "kernels/llada_kernels" in allowed


def test_hadolint_accepts_it() -> None:
    checked = subprocess.run([tool("hadolint"), "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout == ""


def test_hadolint_sees(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN apt-get install python3\n")
    checked = subprocess.run([tool("hadolint"), tmp_path / "Dockerfile"], capture_output=True, text=True)
    assert checked.returncode != 0
    assert "DL3006" in checked.stdout


@pytest.mark.full
@pytest.mark.parametrize("extra", ["gpu", "docs"])
def test_extras_resolve_for_python_3_12_on_linux(extra: str, tmp_path: Path) -> None:
    """Every package that is installed, pinned; nothing is downloaded but descriptions."""
    command = [tool("uv"), "pip", "compile", "pyproject.toml", "--extra", extra, "--constraint", "constraints.txt"]
    command += ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--no-header", "--no-annotate", "--quiet"]
    resolved = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if resolved.returncode != 0 and re.search(r"dns error|error sending request|timed out|offline", resolved.stderr):
        pytest.skip("the package index cannot be reached")
    assert resolved.returncode == 0, resolved.stderr
    found = {normal(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", resolved.stdout, re.MULTILINE)}
    pins = constraints((3, 12))
    assert {name: pins.get(name) for name in PINNED.values() if name in found} == {
        name: found[name] for name in PINNED.values() if name in found
    }
    if extra == "gpu":
        assert {"transformer-engine-torch", "transformer-engine-cu13", "nvidia-cudnn-frontend", "torch"} <= set(found)
    # PyTorch itself names the exact versions of NVIDIA's libraries.
    unpinned = {name for name in found if name not in pins and not name.startswith(("nvidia-", "cuda-toolkit"))}
    assert unpinned == set()
