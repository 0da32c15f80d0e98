"""Counts what a rank communicates, below every Python interface: the operations as PyTorch's dispatcher sees them.

`torch.distributed` functions, their underscore and coalesced variants and the process groups' own methods all end in
the same few operations of ``c10d``, in the forward and in the backward pass. Bytes are what a rank sends when a
collective over n ranks is done by a ring: all-reduce 2 (n-1)/n of the tensor, all-gather and reduce-scatter (n-1)/n of
the whole, all-to-all what is meant for others, point to point the message.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from llada_mega.parallel import ParallelGroups

# Which axis the names of Megatron's ProcessGroupCollection belong to; the others carry sums of a few numbers.
AXES = {
    "tp": "tp",
    "expt_tp": "tp",
    "pp": "pp",
    "embd": "pp",
    "cp": "cp",
    "ep": "ep",
    "tp_ep": "ep",
    "dp": "dp",
    "dp_cp": "dp",
    "expt_dp": "dp",
    "intra_dp_cp": "dp",
    "intra_expt_dp": "dp",
}


class TrafficCounter(TorchDispatchMode):
    """Adds up, while it is entered, the bytes that this rank sends.

    Attributes:
        sent: bytes by (axis, operation), such as ("tp", "allreduce").
    """

    def __init__(self, groups: ParallelGroups) -> None:
        super().__init__()
        self.sent: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._axes = axes_by_group(groups)

    def by_axis(self) -> dict[str, float]:
        """Bytes sent by axis, without the axes that sent none."""
        total: defaultdict[str, float] = defaultdict(float)
        for (axis, _), count in self.sent.items():
            total[axis] += count
        return {axis: count for axis, count in total.items() if count}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        elif func.namespace.startswith("_c10d_functional") and _starts_communication(func):
            raise NotImplementedError(f"{func}: functional collectives are not counted; nothing here uses them")
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        operation = name.rstrip("_")
        if operation.startswith(("recv", "barrier")):
            return
        if operation not in SENT:
            raise NotImplementedError(f"c10d.{name}: how much does it send?")
        group = process_group(args)
        if group.size() == 1:
            return
        # Only pipelines send point to point. With two stages Megatron does it in one direction over the whole world's
        # group, so that both directions are under way at once.
        axis = "pp" if operation == "send" else self._axes.get(group.group_name, "other")
        self.sent[axis, operation.strip("_")] += SENT[operation](args, group)


def axes_by_group(groups: ParallelGroups) -> dict[str, str]:
    """Axis by the name of the process group."""
    found: dict[str, str] = {}
    for field in fields(groups.collection):
        group = getattr(groups.collection, field.name, None)
        if isinstance(group, ProcessGroup):
            found.setdefault(group.group_name, AXES.get(field.name, "other"))
    return found


def process_group(args: Iterable[Any]) -> ProcessGroup:
    """The process group among the arguments of an operation of ``c10d``."""
    boxed = next(a for a in args if isinstance(a, torch.ScriptObject) and _class(a).endswith("c10d.ProcessGroup"))
    return ProcessGroup.unbox(boxed)


def _class(script_object: torch.ScriptObject) -> str:
    return script_object._type().qualified_name()


def _starts_communication(func: Any) -> bool:
    return not func.overloadpacket.__name__.startswith(("wait_tensor", "_wrap_tensor"))


def _bytes(tensors: Any) -> int:
    """Of a tensor, or of all tensors in nested lists."""
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(_bytes(tensor) for tensor in tensors)


def _to_others(args: Any, group: ProcessGroup) -> int:
    """All-to-all of one tensor, cut into pieces for each rank: ``input_splits`` rows, or equal pieces."""
    _, sent, _, _, splits, *_ = args
    if not splits:
        return sent.nbytes * (group.size() - 1) // group.size()
    return sent.nbytes // max(len(sent), 1) * (sum(splits) - splits[group.rank()])


def _ring(share: float, argument: int) -> Callable[[Any, ProcessGroup], float]:
    """``share`` x (n-1)/n of the argument that is as large as the whole."""
    return lambda args, group: share * (group.size() - 1) / group.size() * _bytes(args[argument])


# The bytes that an operation sends, from its arguments. Outputs come first, inputs second.
SENT: dict[str, Callable[[Any, ProcessGroup], float]] = {
    "allreduce": _ring(2, 0),
    "allreduce_coalesced": _ring(2, 0),
    "broadcast": _ring(1, 0),
    "reduce": _ring(1, 0),
    "allgather": _ring(1, 0),
    "_allgather_base": _ring(1, 0),
    "allgather_into_tensor_coalesced": _ring(1, 0),
    "reduce_scatter": _ring(1, 1),
    "_reduce_scatter_base": _ring(1, 1),
    "reduce_scatter_tensor_coalesced": _ring(1, 1),
    "alltoall_base": _to_others,
    "send": lambda args, group: _bytes(args[0]),
}
