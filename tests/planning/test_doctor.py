"""llada-mega doctor: tables and JSON, on machines that have little and much."""

from __future__ import annotations

import ctypes
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from llada_kernels import BACKENDS
from rich.console import Console

from llada_mega.cli import main
from llada_mega.parallel.capabilities import Choice
from llada_mega.planning import doctor
from llada_mega.planning.doctor import Diagnosis, Part, diagnose, render


def test_json_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "json=true"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    parts = {part["name"]: part for group in ("machine", "libraries", "attention") for part in report[group]}
    assert {"Python", "PyTorch", "Megatron-Core", "CPU", "CUDA", "cuDNN", "NCCL", "gloo"} <= set(parts)
    assert {"memory", "disk", "shared memory", "clock"} <= set(parts)
    assert {"transformer-engine", "apex", "nvidia-cudnn-frontend", "triton", "tensorboard", "wandb"} <= set(parts)
    assert {"deep_ep", "nvidia-resiliency-ext"} <= set(parts)
    assert set(BACKENDS) <= set(parts)
    assert parts["PyTorch"]["found"] == str(torch.__version__)
    assert all(part["usable"] or part["note"] for part in parts.values())  # what is missing is explained
    assert set(report["choices"]) == {
        *("layers", "norm", "optimizer", "gradient clipping", "gradient accumulation fusion"),
        *("attention", "collectives"),
    }


def test_without_cuda_everything_is_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choices = {topic: choice.name for topic, choice in diagnose().choices.items()}
    assert (choices["layers"], choices["attention"], choices["collectives"]) == ("local", "cpu", "gloo")


def test_what_is_required_and_missing_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The exit status is a health check's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "doctor.json"
    assert main(["doctor", "require=[CUDA,gloo]", f"output={output}"]) == 1
    assert "problem: CUDA: " in capsys.readouterr().out
    problems = json.loads(output.read_text("utf-8"))["problems"]
    assert len(problems) == 1
    assert problems[0].endswith("everything runs on the CPU")


def test_little_space_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage._replace(free=2**26))
    disk, shared = diagnose(path=tmp_path / "runs" / "new").problems
    assert disk.startswith(f"disk: less than 1 GiB free on {tmp_path}: ")  # where the run's directory will be made
    assert shared.startswith("shared memory: less than 0.25 GiB free on /dev/shm")
    assert asked == [tmp_path, Path("/dev/shm")]


@pytest.mark.parametrize(("answer", "usable"), [(0, True), (4, True), (5, False), (-1, False)])
def test_the_clock_is_what_the_kernel_says(monkeypatch: pytest.MonkeyPatch, answer: int, usable: bool) -> None:
    kernel = SimpleNamespace(adjtimex=lambda buffer: answer)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: kernel)
    assert {part.name: part for part in diagnose().machine}["clock"].usable is usable


def test_a_gpu_that_does_not_compute_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error\nmore")

    monkeypatch.setattr(torch, "ones", fail)
    part = doctor._gpu(3)
    assert (part.name, part.usable) == ("GPU 3", False)
    assert part.note == "it does not compute (CUDA error: uncorrectable ECC error)"


def test_backends_are_judged_for_the_heads() -> None:
    notes = {part.name: part for part in diagnose(head_dim=128, dtype=torch.float32).attention}
    assert notes["cpu"].usable
    assert not notes["cudnn"].usable


@pytest.mark.parametrize("width", [60, 100, 160])
def test_tables_lose_nothing(width: int) -> None:
    diagnosis = Diagnosis(
        machine=(Part("GPU 0", "NVIDIA H100", True), Part("NCCL", None, False, "gloo carries the collectives")),
        libraries=(Part("apex", "0.1", False, "importing it fails"),),
        attention=(Part("cudnn", "fused", True),),
        choices={"layers": Choice("te", "TransformerEngine and CUDA are there")},
        problems=("NCCL: gloo carries the collectives",),
    )
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(diagnosis))
    words = console.export_text().replace("│", " ").split()
    assert {"H100", "NCCL", "gloo", "collectives", "apex", "fails", "cudnn", "TransformerEngine"} <= set(words)
    assert words.count("✗") == 2
    assert words.count("problem:") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [("dtype=int8", "dtype=int8"), ("head_dim=0", "head_dim=0"), ("require=[cuda]", "require=cuda is not a choice")],
)
def test_mistakes_end_in_one_line(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", override]) == 2
    assert message in capsys.readouterr().err
