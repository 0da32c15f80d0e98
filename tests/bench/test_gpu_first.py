"""The first hour on a GPU, with steps that need none: order, limits, results, resumption."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu_first import PAGE, ROOT, STEPS, Step, run_steps

IDENTITY = {"gpu": "NVIDIA H100 80GB HBM3, 79 GiB", "commit": "0123456789ab"}


def python(name: str, code: str, minutes: float = 1, lines: int = 15) -> Step:
    return Step(name, f"Title of {name}", ("-c", code), minutes, lines)


def test_the_hour_has_forty_minutes() -> None:
    assert sum(step.minutes for step in STEPS) < 40
    assert len({step.name for step in STEPS}) == len(STEPS)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_what_a_step_names_exists(step: Step) -> None:
    for argument in step.arguments:
        if argument.startswith("tests"):
            assert (ROOT / argument).exists()
    module = step.arguments[1].replace(".", "/")
    if module.startswith(("bench", "llada")):
        places = [ROOT / f"{module}.py", ROOT / module / "__main__.py", ROOT / "kernels" / module / "__main__.py"]
        assert any(place.is_file() for place in places)


def test_results_are_appended_as_steps_end_and_failures_do_not_stop_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text("# Results\n")
    steps = [
        python("first", "print('\\n'.join(map(str, range(50))))", lines=2),
        python("broken", "import sys; print('no such kernel'); sys.exit(3)"),
        python("last", "import os; print(os.environ['COLUMNS'])"),
    ]
    assert run_steps(steps, IDENTITY, tmp_path / "work", page) == ["broken"]
    text = page.read_text()
    assert text.startswith("# Results\n\n## 20")
    assert text.count("NVIDIA H100 80GB HBM3, 79 GiB\n\nCommit 0123456789ab") == 1
    assert "````text\n48\n49\n````" in text
    assert "### Title of broken: FAILED with exit status 3, " in text
    assert "no such kernel" in text
    assert text.index("Title of first: passed") < text.index("Title of broken") < text.index("Title of last: passed")


def test_what_passed_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, counter = tmp_path / "results.md", tmp_path / "runs"
    count = f"open({str(counter)!r}, 'a').write('x')"
    broken = [python("good", count), python("bad", "raise SystemExit(1)")]
    mended = [python("good", count), python("bad", "print('mended')")]
    assert run_steps(broken, IDENTITY, tmp_path, page) == ["bad"]
    assert run_steps(mended, IDENTITY, tmp_path, page) == []
    assert counter.read_text() == "x"
    assert "good: has passed before" in capsys.readouterr().out
    assert "mended" in page.read_text()
    assert run_steps(mended, IDENTITY | {"commit": "other"}, tmp_path, page) == []  # other sources: all of it again
    assert counter.read_text() == "xx"


def test_a_step_is_ended_at_its_limit_with_what_it_started(tmp_path: Path) -> None:
    child_file = tmp_path / "child"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child_file)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    assert run_steps([python("slow", code, minutes=0.1)], IDENTITY, tmp_path, tmp_path / "page.md") == ["slow"]
    assert "ENDED after its limit of 0.1 minutes" in (tmp_path / "page.md").read_text()
    state = Path(f"/proc/{child_file.read_text()}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":  # it is being ended; a zombie waits for its parent
        time.sleep(0.01)


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("for a machine without CUDA")
    before = PAGE.read_text()
    done = subprocess.run([sys.executable, "-m", "bench.gpu_first"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: this needs a CUDA device, and PyTorch ")
    assert done.stderr.count("\n") == 1
    assert PAGE.read_text() == before
