"""The preflight on real processes, over gloo."""

from __future__ import annotations

from pathlib import Path

from tests.launch import workers
from tests.parallel.harness import run_ranks

HOSTS = ["n1", "n2", "n3"]


def run(run_dirs: list[Path], need_bytes: int = 0, minimum: float | None = None) -> list[str]:
    """The problems, which all ranks must see alike."""
    results = run_ranks(
        workers.preflight, len(run_dirs), run_dirs=run_dirs, need_bytes=need_bytes, minimum=minimum, hosts=HOSTS
    )
    assert all(result == results[0] for result in results)
    return results[0]


def test_a_sound_job_passes_and_leaves_nothing(tmp_path: Path) -> None:
    assert run([tmp_path] * 2) == []
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_and_bandwidth_name_the_nodes(tmp_path: Path) -> None:
    problems = run([tmp_path] * 2, need_bytes=2**60)
    assert [problem.split(" GiB")[0].split(":")[0] for problem in problems] == ["n1", "n2"]
    problems = run([tmp_path] * 2, minimum=1e6)
    assert [problem.split(" all-reduce")[0] for problem in problems] == ["n1:", "n2:"]


def test_another_directory_and_a_missing_one_name_the_node(tmp_path: Path) -> None:
    for name in ("shared", "own"):
        (tmp_path / name).mkdir()
    other, missing = run([tmp_path / "shared", tmp_path / "own", tmp_path / "missing"])[:2]
    assert other.startswith("n2: rank 1:")
    assert "is not the directory that rank 0 sees" in other
    assert missing.startswith("n3: rank 2:")


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    heard = run_ranks(workers.one_stays_away, 3, run_dir=tmp_path)
    assert heard[0] == "a test: no sign for 1 s from n1 (rank 1)"
