"""A CUDA device that only looks like one: models of TransformerEngine's modules can be built on it, and nothing runs.

TransformerEngine refuses to build a module without CUDA, although on the meta device nothing of it is used. Import this
module before any other that asks for CUDA; "the current device" is then ``meta``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore


class _Nothing:
    """Stands for streams and events."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class _Properties:
    major, minor, name, multi_processor_count, total_memory = 9, 0, "meta", 132, 80 * 2**30


def install() -> None:
    """Replace what building a model asks of ``torch.cuda``."""
    warnings.simplefilter("ignore")
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: "meta",
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: _Properties(),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "meta",
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: _Nothing(),
        "Stream": _Nothing,
        "Event": _Nothing,
    }
    for name, value in replaced.items():
        for module in (torch.cuda, torch.cuda.random):
            if hasattr(module, name):
                setattr(module, name, value)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


class CudaIsMeta(TorchFunctionMode):
    """Names of CUDA devices mean the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(_device, args), **{name: _device(value) for name, value in (kwargs or {}).items()})


def _device(value: Any) -> Any:
    names_cuda = isinstance(value, str | torch.device) and str(value).partition(":")[0] == "cuda"
    return type(value)("meta") if names_cuda else value


@contextlib.contextmanager
def world(rank: int, world_size: int) -> Iterator[None]:
    """Be one of ``world_size`` ranks of which the others do not exist: collectives return at once."""
    new_group = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **(kwargs | {"backend": "fake", "pg_options": None}))

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    dist.new_group = fake_group
    try:
        with CudaIsMeta():
            yield
    finally:
        dist.new_group = new_group
        dist.destroy_process_group()
