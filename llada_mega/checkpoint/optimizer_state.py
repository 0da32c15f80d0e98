"""AdamW's state as parts of global tensors, whichever of Megatron's optimizers holds it.

The distributed optimizer gives each data-parallel rank a range of the flattened parameters, cut without regard to rows.
A range of a flattened matrix is at most three boxes (the end of a row, whole rows, the start of a row), and boxes are
what ``storage.py`` keeps. So every rank writes and reads its own part, nothing is gathered, and a checkpoint is the
same with and without the distributed optimizer, under every layout.

Keys are Megatron's: ``optimizer.state.<name>.<key of the weight>``, with ``exp_avg`` and ``exp_avg_sq``, and
``fp32_param`` when the weights are bf16. Megatron's own loading is not used: without TransformerEngine or apex it gives
all parameters one tensor as their step, so that AdamW's count runs ahead by the number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape
_PREFIX = "optimizer.state"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)


class _Held(NamedTuple):
    """What this rank optimises of one model parameter: elements from ``start`` on of the flattened parameter."""

    inner: torch.optim.Optimizer
    main: Tensor  # the tensor that the optimizer changes; the parameter itself, or an fp32 copy or range of it
    start: int
    is_range: bool  # each data-parallel rank holds another range


def sharded_adam_state(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> dict[str, ShardedTensor]:
    """This rank's part of the optimizer state, as views: filling ``data`` in place changes the optimizer.

    Args:
        optimizer: from ``get_megatron_optimizer``. Moments that do not exist yet are created as zeros.
        model_state: the sharded state of the models' weights, factories not applied yet.
    """
    weights = {id(value.data): value for value in nested_values(model_state) if _is_tensor(value)}
    shards: dict[str, ShardedTensor] = {}
    for parameter, held in _held_parameters(optimizer, weights):
        tensors = {name: _moments(held)[name] for name in _MOMENTS}
        if parameter.dtype != held.main.dtype:
            tensors["fp32_param"] = held.main
        for piece, first in _pieces(weights[id(parameter)]):
            for name, tensor in tensors.items():
                for shard in _boxes_of_piece(piece, first, tensor.detach().view(-1), held, name):
                    shards[f"{shard.key}@{shard.global_offset}"] = shard
    return shards


def set_adam_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Set the number of updates made; torch counts it for each parameter, apex and TransformerEngine for each group."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            if not isinstance(part.optimizer, _TORCH_ADAM):
                group["step"] = step
                continue
            for parameter in group["params"]:
                part.optimizer.state[parameter]["step"] = torch.tensor(float(step))


def boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """The elements ``[start, stop)`` of a flattened tensor of ``shape``, as boxes in their order."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _in_row(first, head, tail, shape)
        return
    if head:
        yield from _in_row(first, head, row, shape)
        first += 1
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(last, 0, tail, shape)


def _in_row(index: int, start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    for offset, size in boxes(start, stop, shape[1:]):
        yield (index, *offset), (1, *size)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, ShardedTensor | ShardedTensorFactory) and value.data is not None


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers of dense and of expert parameters; a rank without parameters of a kind has a stub."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not part.is_stub_optimizer]


def _held_parameters(optimizer: MegatronOptimizer, weights: dict[int, Any]) -> Iterator[tuple[Tensor, _Held]]:
    for part in _parts(optimizer):
        inner = part.optimizer
        if isinstance(part, DistributedOptimizer):
            for parameter, (group, index) in part.model_param_group_index_map.items():
                start = part._get_model_param_range_map(parameter)["param"].start
                yield parameter, _Held(inner, inner.param_groups[group]["params"][index], start, True)
            continue
        mains = {id(main) for group in inner.param_groups for main in group["params"]}
        for weight in weights.values():
            main = getattr(weight.data, "main_param", weight.data)
            if id(main) in mains:
                yield weight.data, _Held(inner, main, 0, False)


def _moments(held: _Held) -> dict[str, Tensor]:
    """AdamW's state of one tensor; all three optimizers look whether it is empty before they create it."""
    state = held.inner.state[held.main]
    for name in _MOMENTS:
        if name not in state:
            state[name] = torch.zeros_like(held.main, dtype=torch.float32).detach()
    if isinstance(held.inner, _TORCH_ADAM):
        state.setdefault("step", torch.tensor(0.0))
    return state


def _pieces(weight: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[ShardedTensor, int]]:
    """A weight's places in the global tensor, each with the index of its first element in the flattened weight.

    A gated MLP's first matrix [gate; up] has two places; factories cut along the first axis only.
    """
    if isinstance(weight, ShardedTensor):
        yield weight, 0
        return
    assert weight.data is not None
    for piece in nested_values({"weight": weight.build()}):
        assert piece.data is not None and piece.data.is_contiguous()
        yield piece, piece.data.storage_offset() - weight.data.storage_offset()


def _boxes_of_piece(piece: ShardedTensor, first: int, flat: Tensor, held: _Held, name: str) -> Iterator[ShardedTensor]:
    """The part of a piece that this rank holds: ``flat`` covers ``[held.start, held.start + len(flat))``."""
    size, ahead = math.prod(piece.local_shape), first - held.start
    start, stop = max(0, -ahead), min(size, len(flat) - ahead)
    axes = piece.prepend_axis_num
    for offset, shape in boxes(start, stop, piece.local_shape):
        begin = ahead + start
        start += math.prod(shape)
        yield replace(
            piece,
            key=f"{_PREFIX}.{name}.{piece.key}",
            data=flat[begin : ahead + start].view(shape),
            dtype=flat.dtype,
            local_shape=shape,
            global_offset=(
                *piece.global_offset[:axes],
                *(a + b for a, b in zip(piece.global_offset[axes:], offset, strict=True)),
            ),
            axis_fragmentations=None,
            replica_id=_without_data_parallel(piece.replica_id) if held.is_range else piece.replica_id,
        )


def _without_data_parallel(replica_id: Any) -> Any:
    """Megatron's ids are (pipeline copy, tensor-parallel rank, data-parallel rank); the last has ranges of its own."""
    return (*replica_id[:2], 0)
