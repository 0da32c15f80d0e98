"""What this machine has, what a run would make of it, and what is missing at what cost."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
from llada_kernels import BACKENDS
from rich.box import ROUNDED
from rich.console import Group
from rich.table import Table
from rich.text import Text

from llada_mega.config.model import ModelConfig
from llada_mega.parallel.capabilities import (
    APEX,
    TE,
    Choice,
    choose_attention,
    choose_gradient_fusion,
    choose_implementation,
    clip_library,
    norm_library,
    obstacle,
    optimizer_library,
    version,
)

_GIB = 2**30


@dataclass(frozen=True)
class Part:
    """Something that a machine may have.

    Attributes:
        name: what it is.
        found: version or description; None when there is none.
        usable: it can be used here.
        note: why it cannot be used and what that costs; empty when nothing is lost.
    """

    name: str
    found: str | None
    usable: bool
    note: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The answer of the doctor.

    Attributes:
        machine: parts of this machine: Python, PyTorch, devices, collectives.
        libraries: what can be installed on top.
        attention: the backends, best first.
        choices: what a run on this machine uses, by topic, with the reason.
    """

    machine: tuple[Part, ...]
    libraries: tuple[Part, ...]
    attention: tuple[Part, ...]
    choices: dict[str, Choice]


def diagnose(head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> Diagnosis:
    """Look at this machine for a model with heads of ``head_dim`` channels and parameters in ``dtype``."""
    return Diagnosis(
        machine=tuple(_machine()),
        libraries=tuple(_libraries()),
        attention=tuple(_attention(head_dim, dtype)),
        choices=_choices(head_dim, dtype),
    )


def _machine() -> Iterator[Part]:
    memory = psutil.virtual_memory()
    yield Part("Python", platform.python_version(), True)
    yield Part("PyTorch", str(torch.__version__), True)
    yield Part("Megatron-Core", version("megatron-core"), True)
    cores = len(os.sched_getaffinity(0))
    yield Part("CPU", f"{cores} core{'s'[: cores > 1]}, {memory.total / _GIB:.0f} GiB memory", True)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        found = f"{device.name}, {device.total_memory / _GIB:.0f} GiB, compute capability {device.major}.{device.minor}"
        yield Part(f"GPU {index}", found, True)
    cuda = torch.version.cuda
    lack = "this PyTorch is built without it" if cuda is None else "no driver or no GPU"
    yield Part("CUDA", cuda, count > 0, "" if count else f"{lack}: everything runs on the CPU")
    has_nccl = dist.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl and count else None
    lack = "this PyTorch is built without it" if not has_nccl else "no GPU to use it on"
    yield Part("NCCL", nccl, nccl is not None, "" if nccl else f"{lack}: gloo carries the collectives")
    gloo = dist.is_gloo_available()
    lack = "this PyTorch is built without it: several processes need GPUs and NCCL"
    yield Part("gloo", "built into PyTorch" if gloo else None, gloo, "" if gloo else lack)


def _libraries() -> Iterator[Part]:
    for distribution, library, cost in (
        ("transformer-engine", TE, "norms apart from linear layers, experts one by one"),
        ("apex", APEX, "nothing is lost where TransformerEngine is"),
    ):
        reason = obstacle(library)
        yield Part(distribution, version(distribution), reason is None, f"{reason}: {cost}" if reason else "")
    for distribution, cost in (
        ("nvidia-cudnn-frontend", "no attention backend cudnn"),
        ("triton", "no attention backend triton"),
        ("tensorboard", "logging.tensorboard=true stops a run"),
        ("wandb", "logging.wandb=true stops a run"),
    ):
        found = version(distribution)
        yield Part(distribution, found, found is not None, "" if found else f"it is not installed: {cost}")


def _attention(head_dim: int, dtype: torch.dtype) -> Iterator[Part]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, backend in BACKENDS.items():
        reason = backend.obstacle(device, dtype, head_dim)
        yield Part(name, backend.SUMMARY, reason is None, reason or "")


def _choices(head_dim: int, dtype: torch.dtype) -> dict[str, Choice]:
    model = ModelConfig(head_dim=head_dim)
    implementation = choose_implementation("auto", dtype)
    first = "the first of TransformerEngine, apex and PyTorch that can be used"
    return {
        "layers": implementation,
        "norm": Choice(
            norm_library(implementation.name), "goes with the layers; apex has no RMSNorm that Megatron-Core uses"
        ),
        "optimizer": Choice(optimizer_library(), first),
        "gradient clipping": Choice(clip_library(), first),
        "gradient accumulation fusion": choose_gradient_fusion(None, implementation.name),
        "attention": choose_attention(model, dtype),
        "collectives": Choice("nccl", "CUDA is there") if torch.cuda.is_available() else Choice("gloo", "no CUDA"),
    }


def render(diagnosis: Diagnosis) -> Group:
    """The diagnosis as tables for the terminal. ✓ can be used, ✗ cannot."""
    tables: list[Any] = []
    for title, parts in (
        ("This machine", diagnosis.machine),
        ("Optional libraries", diagnosis.libraries),
        ("Attention backends, best first", diagnosis.attention),
    ):
        table = _table(title, "part", "found", "what is missing, and what that costs")
        for part in parts:
            mark = Text("✓ ", style="green") if part.usable else Text("✗ ", style="red")
            table.add_row(mark + Text(part.name), Text(part.found or "-"), Text(part.note))
        tables.append(table)
    chosen = _table("A run on this machine uses", "for", "choice", "because")
    for topic, choice in diagnosis.choices.items():
        chosen.add_row(Text(topic), Text(choice.name, style="bold"), Text(choice.reason))
    return Group(*tables, chosen)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=ROUNDED, header_style="dim", expand=True)
    for column, ratio in zip(columns, (3, 5, 8), strict=True):
        table.add_column(column, ratio=ratio, overflow="fold")
    return table
