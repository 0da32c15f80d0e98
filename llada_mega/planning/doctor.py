"""What this machine has, what a run would make of it, and what is missing at what cost."""

from __future__ import annotations

import ctypes
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from llada_kernels import BACKENDS
from rich.box import ROUNDED
from rich.console import Group
from rich.table import Table
from rich.text import Text

from llada_mega.config.checks import one_of
from llada_mega.config.model import ModelConfig
from llada_mega.parallel.capabilities import (
    APEX,
    DEEP_EP,
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
from llada_mega.ranks import usable_cores

_GIB = 2**30
MIN_DISK_GIB = 1.0  # below it, not even the small runs of the documentation can save
MIN_SHARED_GIB = 0.25  # data workers and NCCL pass buffers through /dev/shm; containers are often given 0.06
_TIME_ERROR = 5  # what adjtimex(2) answers when nothing keeps the clock right
_TIMEX_BYTES = 1024  # more than struct timex has on any platform


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
        problems: what keeps runs from working here, one line each; empty on a healthy machine.
    """

    machine: tuple[Part, ...]
    libraries: tuple[Part, ...]
    attention: tuple[Part, ...]
    choices: dict[str, Choice]
    problems: tuple[str, ...] = ()


# Without these no run works anywhere; GPUs and libraries are asked for by name.
_ALWAYS_NEEDED = ("disk", "shared memory", "gloo")


def diagnose(
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    path: str | Path = ".",
    require: Sequence[str] = (),
) -> Diagnosis:
    """Look at this machine.

    Args:
        head_dim: channels of the attention heads that backends are judged for.
        dtype: of the parameters.
        path: where runs will be written.
        require: names of parts whose absence is a problem.

    Raises:
        ConfigError: ``require`` names no part.
    """
    machine = tuple(_machine(Path(path)))
    libraries = tuple(_libraries())
    attention = tuple(_attention(head_dim, dtype))
    parts = {part.name: part for part in (*machine, *libraries, *attention)}
    for name in require:
        one_of("require", name, list(parts))
    needed = dict.fromkeys(
        (*_ALWAYS_NEEDED, *(part.name for part in machine if part.name.startswith("GPU ")), *require)
    )
    return Diagnosis(
        machine=machine,
        libraries=libraries,
        attention=attention,
        choices=_choices(head_dim, dtype),
        problems=tuple(f"{name}: {parts[name].note}" for name in needed if not parts[name].usable),
    )


def _machine(path: Path) -> Iterator[Part]:
    yield Part("Python", platform.python_version(), True)
    yield Part("PyTorch", str(torch.__version__), True)
    yield Part("Megatron-Core", version("megatron-core"), True)
    cores = usable_cores()
    yield Part("CPU", f"{cores} core{'s'[: cores > 1]}", True)
    memory = psutil.virtual_memory()
    yield Part("memory", f"{memory.total / _GIB:.0f} GiB, {memory.available / _GIB:.0f} GiB available", True)
    yield _free_space("disk", path, MIN_DISK_GIB, f"nothing can be saved under {path.absolute()}")
    yield _free_space("shared memory", Path("/dev/shm"), MIN_SHARED_GIB, "data workers and NCCL fail (--shm-size)")
    yield _clock()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        yield _gpu(index)
    cuda = torch.version.cuda
    lack = "this PyTorch is built without it" if cuda is None else "no driver or no GPU"
    yield Part("CUDA", cuda, count > 0, "" if count else f"{lack}: everything runs on the CPU")
    cudnn = torch.backends.cudnn.version() if count else None
    lack = "no cuDNN in this PyTorch" if count else "no GPU to use it on"
    yield Part("cuDNN", str(cudnn) if cudnn else None, cudnn is not None, "" if cudnn else lack)
    has_nccl = dist.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl and count else None
    lack = "this PyTorch is built without it" if not has_nccl else "no GPU to use it on"
    yield Part("NCCL", nccl, nccl is not None, "" if nccl else f"{lack}: gloo carries the collectives")
    gloo = dist.is_gloo_available()
    lack = "this PyTorch is built without it: several processes need GPUs and NCCL"
    yield Part("gloo", "built into PyTorch" if gloo else None, gloo, "" if gloo else lack)


def _free_space(name: str, path: Path, needed_gib: float, cost: str) -> Part:
    """Free space where ``path`` is or will be."""
    while not path.exists() and path != path.parent:
        path = path.absolute().parent
    free = shutil.disk_usage(path).free / _GIB
    note = "" if free >= needed_gib else f"less than {needed_gib:g} GiB free on {path.absolute()}: {cost}"
    return Part(name, f"{free:.1f} GiB free", not note, note)


def _clock() -> Part:
    """Whether the kernel says that something, usually NTP, keeps the clock right."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))  # zeros: reads, changes nothing
    except (AttributeError, OSError):
        return Part("clock", None, False, "this system does not say whether it is synchronised")
    lost = "time stamps of several nodes cannot be compared"
    if 0 <= state < _TIME_ERROR:
        return Part("clock", "synchronised", True)
    return Part("clock", "not synchronised", False, f"nothing keeps it right, as NTP would: {lost}")


def _gpu(index: int) -> Part:
    """Device ``index``, which has to add two numbers."""
    device = torch.cuda.get_device_properties(index)
    found = f"{device.name}, {device.total_memory / _GIB:.0f} GiB, compute capability {device.major}.{device.minor}"
    try:
        works = torch.ones(2, device=f"cuda:{index}").sum().item() == 2
    except RuntimeError as error:
        return Part(f"GPU {index}", found, False, f"it does not compute ({str(error).splitlines()[0]})")
    return Part(f"GPU {index}", found, works, "" if works else "it computes wrongly: 1 + 1 is not 2")


def _libraries() -> Iterator[Part]:
    for distribution, library, cost in (
        ("transformer-engine", TE, "norms apart from linear layers, experts one by one"),
        ("apex", APEX, "nothing is lost where TransformerEngine is"),
        ("deep_ep", DEEP_EP, "parallel.dispatcher=deepep and hybridep are refused; alltoall needs none"),
    ):
        reason = obstacle(library)
        yield Part(distribution, version(distribution), reason is None, f"{reason}: {cost}" if reason else "")
    for distribution, cost in (
        ("nvidia-cudnn-frontend", "no attention backend cudnn"),
        ("triton", "no attention backend triton"),
        ("nvidia-resiliency-ext", "hangs are found by the run's own watchdog only"),
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
    return Group(*tables, chosen, *(Text(f"problem: {problem}", style="bold red") for problem in diagnosis.problems))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=ROUNDED, header_style="dim", expand=True)
    for column, ratio in zip(columns, (3, 5, 8), strict=True):
        table.add_column(column, ratio=ratio, overflow="fold")
    return table
