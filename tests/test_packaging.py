"""The wheel: complete, and enough to work outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a clean copy, so that nothing lands in the checkout and nothing old lands in the wheel."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc")
    for name in ("llada_mega", "kernels", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run([*command, "-w", str(target), str(source)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return next(target.glob("*.whl"))


def test_the_wheel_holds_everything(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for base, prefix in ((ROOT / "llada_mega", "llada_mega"), (ROOT / "kernels/llada_kernels", "llada_kernels")):
        for path in base.rglob("*"):
            if path.is_file() and path.suffix in (".py", ".j2", ".html", ".css", ".svg", ".typed"):
                expected.add(f"{prefix}/{path.relative_to(base)}")
    for path in (ROOT / "configs").rglob("*.yaml"):
        expected.add(f"llada_mega/configs/{path.relative_to(ROOT / 'configs')}")
    assert "llada_mega/configs/experiment/cpt_100b.yaml" in expected
    assert expected - names == set()
    assert not [name for name in names if name.startswith(("tests", "docs"))]


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = os.environ | {"PYTHONPATH": str(site)}
    code = (
        "import llada_mega, llada_kernels, sys; from llada_mega.cli import main;"
        "print(llada_mega.__file__, llada_kernels.__file__, file=sys.stderr);"
        "sys.exit(main(['train', 'experiment=cpt_100b', '--cfg', 'job']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(str(site)) == 2
    assert "num_layers: 32" in result.stdout


def test_every_pinned_version_satisfies_what_the_project_asks_for() -> None:
    from packaging.requirements import Requirement

    pins = [
        Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    canonical = {re.sub(r"[-_.]+", "-", pin.name).lower(): [] for pin in pins}
    for pin in pins:
        canonical[re.sub(r"[-_.]+", "-", pin.name).lower()].append(pin)
    for text in wanted:
        requirement = Requirement(text)
        candidates = canonical.get(re.sub(r"[-_.]+", "-", requirement.name).lower(), [])
        assert candidates, f"constraints.txt does not pin {requirement.name}"
        for version in ("3.11", "3.12"):
            place = {"python_version": version, "python_full_version": f"{version}.0"}
            if requirement.marker is not None and not requirement.marker.evaluate(place):
                continue
            chosen = [pin for pin in candidates if pin.marker is None or pin.marker.evaluate(place)]
            assert len(chosen) == 1, f"{requirement.name} on Python {version}: {[str(pin) for pin in chosen]}"
            pinned = next(iter(chosen[0].specifier)).version
            assert requirement.specifier.contains(pinned), f"{text} against {pinned}"


def test_the_makefile_has_the_promised_targets() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"quickstart", "test", "test-latest", "lint", "bench", "docs"} <= targets
