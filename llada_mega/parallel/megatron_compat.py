"""The one module that knows that Megatron-Core 0.16 and 0.19 differ.

Specs of MLP, MoE and norms are ``ModuleSpec`` objects in 0.16 and callables in 0.19; a few configuration fields exist
in one version only. Everything else in this project uses what both versions share.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

with warnings.catch_warnings():  # "Apex is not installed" and the like: llada-mega doctor says what is missing
    warnings.simplefilter("ignore")
    import megatron.core
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

VERSION: tuple[int, int] = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])  # type: ignore[assignment]
SPECS_ARE_CALLABLES = hasattr(MLP, "as_mlp_submodule")


def transformer_config(**fields: Any) -> TransformerConfig:
    """A ``TransformerConfig`` from the fields that this version knows."""
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    with warnings.catch_warnings():  # its own defaults ("full scope is deprecated") warn
        warnings.simplefilter("ignore")
        return TransformerConfig(**{name: value for name, value in fields.items() if name in known})


def _linears() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def dense_mlp() -> Any:
    """Spec of a dense MLP made of Megatron's local linear layers."""
    if SPECS_ARE_CALLABLES:
        return functools.partial(MLP.as_mlp_submodule, submodules=_linears())
    return ModuleSpec(module=MLP, submodules=_linears())


def moe_mlp(router: Callable[..., Any]) -> Any:
    """Spec of an MoE layer with sequential experts, a shared expert where the config has one, and our router."""
    if SPECS_ARE_CALLABLES:
        submodules = MoESubmodules(
            experts=functools.partial(SequentialMLP, submodules=_linears()),
            shared_experts=functools.partial(SharedExpertMLP, submodules=_linears()),
            router=router,
        )
        return functools.partial(MoELayer, submodules=submodules)
    submodules = MoESubmodules(
        experts=ModuleSpec(module=SequentialMLP, submodules=_linears()),
        shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=_linears()),
        router=router,
    )
    return ModuleSpec(module=MoELayer, submodules=submodules)
