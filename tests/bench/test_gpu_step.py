"""The table of steps on a GPU: its program on the CPU, its cases on GPUs that are pretended."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench import gpu_step
from llada_mega.config.count import total_parameters
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate


def test_without_a_gpu_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_step.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: bench.gpu_step needs a CUDA device; --tiny runs its program on the CPU\n"


def test_the_program_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "gpu_step.json"
    assert gpu_step.main(["--tiny", "--repeats", "1", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["length"], row["block_size"]) for row in rows] == list(gpu_step.TINY_SHAPES)
    for row in rows:
        assert row["failure"] is None
        assert row["tokens_per_second"] == pytest.approx(2 * row["length"] / row["step_seconds"])
        assert row["tflops"] > 0
        assert row["mfu"] is None and row["peak_gib"] is None  # nobody knows a CPU's
    assert rows[1]["positions"] < rows[0]["positions"]  # one block has no clean half
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 1 + len(rows)


def test_what_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(gpu_step, "build_step", fail)
    row = gpu_step.measure(next(gpu_step.cases(tiny=True)), repeats=1)
    assert row.failure == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert gpu_step.line(row).count("|") == gpu_step.HEADER.splitlines()[0].count("|")


@pytest.mark.parametrize(
    ("capability", "recipes"), [((9, 0), {"tensorwise", "blockwise"}), ((10, 0), {"tensorwise", "mxfp8", "blockwise"})]
)
def test_cases_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], recipes: set[str]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    cases = list(gpu_step.cases(tiny=False))
    assert {case.fp8 for case in cases} - {None} == recipes
    assert {case.implementation for case in cases if case.fp8 is None} == {"local", "te"}
    assert {case.implementation for case in cases if case.fp8} == {"te"}
    assert {case.model for case in cases} == {"16B", "100B"}


def test_cases_are_valid_and_fit_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest and those in FP8; by the planner, on 80 GB with what it leaves free."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    cases = [
        case for case in gpu_step.cases(tiny=False) if case.fp8 or (case.implementation, case.length) == ("te", 8192)
    ]
    assert len(cases) == 6
    for case in cases:
        config = case.composed(Config)
        validate(config, world_size=1)
        assert (config.model.implementation, config.trainer.fp8) == (case.implementation, case.fp8)
        assert (config.data.sequence_length, config.curriculum.stages[0].block_size) == (case.length, case.block_size)
        assert 1e9 < total_parameters(config.model) < 3e9
        assert gpu_step.planned_gib(case) < 70, case


def test_batches_are_those_of_the_case() -> None:
    case = next(gpu_step.cases(tiny=True))
    config = case.composed(Config)
    first = gpu_step.make_batches(case, config, torch.device("cpu"))
    again = gpu_step.make_batches(case, config, torch.device("cpu"))
    assert len(first) == case.micro_batches == config.trainer.global_batch_size
    for mine, other in zip(first, again, strict=True):
        assert torch.equal(mine.input_ids_S, other.input_ids_S)
        assert mine.block_size == case.block_size
        assert 0.25 * case.length < mine.num_rows < 0.75 * case.length
    whole = dataclasses.replace(case, block_size=case.length)
    assert gpu_step.make_batches(whole, config, torch.device("cpu"))[0].layout == "mdlm"
