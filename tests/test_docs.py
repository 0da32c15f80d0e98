"""The documents say what the code does, and their links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def module_of_docs(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date() -> None:
    for name, write in module_of_docs("generate").PAGES.items():
        assert (ROOT / "docs" / name).read_text("utf-8") == write(), f"docs/{name} is stale; run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_first_page_leads_to_every_other() -> None:
    for index in (ROOT / "docs" / "index.md", ROOT / "docs" / "api" / "index.md"):
        linked = set(re.findall(r"\]\(([^)#]+\.md)", index.read_text("utf-8")))
        missing = {page.name for page in index.parent.glob("*.md")} - linked - {index.name}
        assert not missing, f"{index} does not link to {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_make_targets_that_are_named_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert target in targets, f"{page.name} names make {target}"
    for path in re.findall(r"`((?:llada_mega|kernels|tests|docs|configs)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """Every page is in its navigation, every link between pages leads somewhere, every name of the API exists."""
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert built.stderr == ""
    for page in (ROOT / "docs" / "api").glob("*.md"):
        html = (tmp_path / "api" / f"{page.stem}.html").read_text("utf-8")
        for name in re.findall(r"^::: (\S+)", page.read_text("utf-8"), flags=re.MULTILINE):
            assert f'id="{name}' in html, f"{page.name} shows nothing of {name}"


def test_links_out_of_the_site_become_text() -> None:
    text = "[a](../bench/step.py) ![b](images/b.png) [c](cluster.md#x) [`d`](../x/d.py) [e](https://e.org) [f](#f)"
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    expected = "a ![b](images/b.png) [c](cluster.md#x) `d` [e](https://e.org) [f](#f)"
    assert module_of_docs("hooks").on_page_markdown(text, page) == expected


@cache
def messages() -> tuple[str, ...]:
    """Every string of the sources, an ellipsis in place of each value that is formatted into it."""
    found = []
    for path in (ROOT / "llada_mega").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


_HEADING = re.compile(r"^### (?:`` (.+) ``|`(.+)`)$", flags=re.MULTILINE)
TROUBLES = [a or b for a, b in _HEADING.findall((ROOT / "docs" / "troubleshooting.md").read_text("utf-8"))]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_messages_of_troubleshooting_are_real(trouble: str) -> None:
    assert trouble in messages(), "no source makes this message"
