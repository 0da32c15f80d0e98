"""Megatron-Core on a machine without CUDA.

Megatron-Core asks for ``torch.cuda.current_device()``, ``device="cuda"``, CUDA streams and the CUDA generator in the
middle of otherwise device-independent code. :func:`install` gives the ``megatron.core`` modules, and nobody else, a
``torch`` whose "cuda" is the CPU: their module-level name ``torch`` becomes a proxy. Modules that are loaded already
are patched at once, the others when they are imported, so the order of imports does not matter. torch itself keeps
its behaviour for everyone else, with one exception: ``Tensor.cuda()``, which could only raise, returns the tensor.

Memory that a step frees stays with the process, for the next step, and all groups of one rank alone are one group. With
CUDA, :func:`install` does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.abc
import importlib.machinery
import platform
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

_PACKAGE = "megatron.core"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_CPU = torch.device("cpu")
_FACTORIES = (
    *("zeros", "ones", "empty", "full", "tensor", "as_tensor", "arange", "linspace", "eye"),
    *("rand", "randn", "randint", "empty_strided"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
)
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float64: "torch.cuda.DoubleTensor",
}
_installed = False


def install() -> None:
    """Make ``megatron.core`` run on the CPU; a no-op with CUDA and when called again."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _keep_freed_memory()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    sys.meta_path.insert(0, _PatchOnImport())
    for name, module in list(sys.modules.items()):
        if name.startswith(_PACKAGE) and module is not None:
            _patch(module)


def is_installed() -> bool:
    """True when this process runs Megatron-Core on the CPU through this module."""
    return _installed


def _keep_freed_memory() -> None:
    """Raise the thresholds of glibc's allocator above which it gives free memory back to the kernel.

    They follow the sizes that a program frees. A step of many tensors of some megabytes stays just above them: it gives
    its memory back, and the next step spends up to a tenth of its time on page faults, in some runs and not in others.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the largest value that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 2**30)


# ---- the torch that Megatron-Core sees -------------------------------------------------------------------------------


def _means_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """``factory`` with ``device="cuda"`` read as the CPU and ``pin_memory`` ignored."""

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _means_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


class _Stream:
    """All work on the CPU is done in order: waiting for a stream or an event is doing nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(state)


def _manual_seed(seed: int) -> None:
    torch.random.default_generator.manual_seed(seed)


class _Proxy(types.ModuleType):
    """A module with some names replaced; the others are looked up in ``original`` once and kept."""

    def __init__(self, original: types.ModuleType, **replaced: Any) -> None:
        super().__init__(original.__name__)
        self.__dict__.update(replaced, _original=original)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_original"], name)
        if callable(value):
            self.__dict__[name] = value
        return value


_RNG = {"get_rng_state": _rng_state, "set_rng_state": _set_rng_state, "manual_seed": _manual_seed}
_CUDA = _Proxy(
    torch.cuda,
    current_device=lambda: _CPU,
    set_device=_nothing,
    synchronize=_nothing,
    empty_cache=_nothing,
    current_stream=lambda *args: _Stream(),
    default_stream=lambda *args: _Stream(),
    stream=lambda stream: contextlib.nullcontext(),
    Stream=_Stream,
    Event=_Event,
    nvtx=_Proxy(torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing),
    random=_Proxy(torch.cuda.random, **_RNG),
    manual_seed_all=_manual_seed,
    **_RNG,
)
_TORCH = _Proxy(torch, cuda=_CUDA, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})


# ---- patching --------------------------------------------------------------------------------------------------------


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Patches each ``megatron.core`` module right after it was executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(_PACKAGE):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                _patch(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch(module: types.ModuleType) -> None:
    if module.__dict__.get("torch") is torch:
        module.torch = _TORCH  # type: ignore[attr-defined]
    special = _SPECIAL.get(module.__name__)
    if special is not None:
        special(module)


def _patch_jit(jit: Any) -> None:
    """``jit_fuser`` is torch.compile: compiling a sum of two tensors costs more than it ever saves on a CPU."""
    jit.disable_jit_fuser()


def _patch_random(random: Any) -> None:
    """One generator plays both the CPU's and the device's role, so the tracker swaps that one."""

    @contextlib.contextmanager
    def fork(self: Any, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        if name not in self.states_:
            raise KeyError(f"no generator state {name!r}: call llada_mega.parallel.initialize first")
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)

    random.CudaRNGStatesTracker.fork = fork
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """``maybe_move_tensor_to_cpu`` of Megatron-Core, which leaves a CPU tensor as it is even when numpy is wanted."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _patch_moe_utils(moe_utils: Any) -> None:
    moe_utils.maybe_move_tensor_to_cpu = _to_host


def _patch_token_dispatcher(token_dispatcher: Any) -> None:
    token_dispatcher.maybe_move_tensor_to_cpu = _to_host


def _patch_parallel_state(parallel_state: Any) -> None:
    """One process group for all that consist of the same single rank, of which a small run has nothing else.

    Gloo has a thread for each group that wakes up a hundred times a second: two dozen took 3 % of a core.
    """
    create = parallel_state.create_group
    groups: dict[tuple[Any, ...], Any] = {}

    def create_group(
        ranks: Sequence[int] | None = None, timeout: Any = None, backend: str | None = None, **options: Any
    ) -> Any:
        if ranks is None or len(ranks) > 1:
            return create(ranks, timeout, backend, **options)
        key = (dist.group.WORLD, *ranks, timeout, backend)
        if key not in groups:
            for stale in [key for key in groups if key[0] is not dist.group.WORLD]:
                del groups[stale]
            groups[key] = create(ranks, timeout, backend, **options)
        return groups[key]

    parallel_state.create_group = create_group


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """``Tensor.type()`` answers as on a GPU: the optimizers sort parameters by that name."""
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return _CUDA_TYPE_NAMES.get(self.dtype) or original(self)

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return call


def _l2_norm(chunk_size: int, overflow: Any, tensor_lists: list[list[torch.Tensor]], *args: Any) -> tuple[Any, None]:
    """Apex's ``multi_tensor_l2norm``, summed in float64.

    ``torch.norm``, which Megatron-Core uses without apex, adds up the squares of a float32 tensor in float32, one after
    another in each SIMD lane: on a CPU 2e-6 too small for 4e5 elements, 3e-4 for 1e7, and more or less for the halves
    of the same tensor. Clipping would depend on the parallel layout, and after some tens of steps so would the loss.
    """
    squares = [tensor.square().sum(dtype=torch.float64) for tensors in tensor_lists for tensor in tensors]
    return torch.stack(squares).sum().sqrt().float()[None], None


def _patch_clip_grads(clip_grads: Any) -> None:
    clip_grads.l2_norm_impl = _l2_norm


def _patch_optimizer(optimizer: Any) -> None:
    # patched where it is used: this module may have bound the name before install()
    optimizer.clip_grad_by_total_norm_fp32 = _with_cuda_type_names(optimizer.clip_grad_by_total_norm_fp32)
    mixed = optimizer.Float16OptimizerWithFloat16Params
    mixed.__init__ = _with_cuda_type_names(mixed.__init__)


def _patch_distributed_optimizer(distrib_optimizer: Any) -> None:
    cls = distrib_optimizer.DistributedOptimizer
    cls.__init__ = _with_cuda_type_names(cls.__init__)


_SPECIAL: dict[str, Callable[[Any], None]] = {
    "megatron.core.jit": _patch_jit,
    "megatron.core.parallel_state": _patch_parallel_state,
    "megatron.core.tensor_parallel.random": _patch_random,
    "megatron.core.transformer.moe.moe_utils": _patch_moe_utils,
    "megatron.core.transformer.moe.token_dispatcher": _patch_token_dispatcher,
    "megatron.core.optimizer.clip_grads": _patch_clip_grads,
    "megatron.core.optimizer.optimizer": _patch_optimizer,
    "megatron.core.optimizer.distrib_optimizer": _patch_distributed_optimizer,
}
