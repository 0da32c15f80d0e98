"""llada-mega doctor: tables and JSON, on machines that have little and much."""

from __future__ import annotations

import io
import json

import pytest
import torch
from llada_kernels import BACKENDS
from rich.console import Console

from llada_mega.cli import main
from llada_mega.parallel.capabilities import Choice
from llada_mega.planning.doctor import Diagnosis, Part, diagnose, render


def test_json_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "json=true"]) == 0
    report = json.loads(capsys.readouterr().out)
    parts = {part["name"]: part for group in ("machine", "libraries", "attention") for part in report[group]}
    assert {"Python", "PyTorch", "Megatron-Core", "CPU", "CUDA", "NCCL", "gloo"} <= set(parts)
    assert {"transformer-engine", "apex", "nvidia-cudnn-frontend", "triton", "tensorboard", "wandb"} <= set(parts)
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
    )
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(diagnosis))
    words = console.export_text().replace("│", " ").split()
    assert {"H100", "NCCL", "gloo", "collectives", "apex", "fails", "cudnn", "TransformerEngine"} <= set(words)
    assert words.count("✗") == 2


@pytest.mark.parametrize(("override", "message"), [("dtype=int8", "dtype=int8"), ("head_dim=0", "head_dim=0")])
def test_mistakes_end_in_one_line(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", override]) == 2
    assert message in capsys.readouterr().err
