"""Counts the bytes of all live tensor storages, below every Python interface, and says which part of a step owns them.

Every operation passes PyTorch's dispatcher; a storage counts from the operation that returns it to its death. Views
share their storage and cost nothing. What a kernel allocates for itself without returning it is no tensor and not seen.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BACKWARD, OUTSIDE = "backward work", "outside modules"


class LiveMemory(TorchDispatchMode):
    """Tracks storages while it is entered, and tensors that were there before if it is told of them (:meth:`hold`).

    A storage belongs to the innermost module with a component in whose forward pass it was made, a recomputed one
    included; to ``BACKWARD`` when the backward pass made it outside of modules; else to ``OUTSIDE``.

    Args:
        components: of modules; the others belong to what is around them.

    Attributes:
        peak: bytes at the largest moment.
        at_peak: bytes of each component at that moment.
    """

    def __init__(self, components: Mapping[torch.nn.Module, str]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self.at_peak: dict[str, int] = {}
        self._bytes: defaultdict[str, int] = defaultdict(int)
        self._live: dict[int, weakref.ref[Any]] = {}
        self._inside: list[str] = []
        self._hooks: list[Any] = []
        self._components = components

    def __enter__(self) -> LiveMemory:
        for module, component in self._components.items():
            self._hooks.append(module.register_forward_pre_hook(self._entering(component)))
            self._hooks.append(module.register_forward_hook(self._leaving, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def hold(self, component: str, tensors: Iterable[Tensor]) -> None:
        """Count storages that exist already."""
        for tensor in tensors:
            self._count(tensor, component)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf, self._owner())
        return result

    def _owner(self) -> str:
        if self._inside:
            return self._inside[-1]
        return BACKWARD if torch._C._current_graph_task_id() >= 0 else OUTSIDE

    def _count(self, tensor: Tensor, component: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or not size:
            return

        def died(_: Any) -> None:
            del self._live[key]
            self._now -= size
            self._bytes[component] -= size

        self._live[key] = weakref.ref(storage, died)
        self._now += size
        self._bytes[component] += size
        if self._now > self.peak:
            self.peak = self._now
            self.at_peak = {name: count for name, count in self._bytes.items() if count}

    def _entering(self, component: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            self._inside.append(component)

        return hook

    def _leaving(self, module: Any, inputs: Any, output: Any) -> None:
        self._inside.pop()
