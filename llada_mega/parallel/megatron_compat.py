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
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.moe import experts as moe_experts
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

VERSION: tuple[int, int] = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])  # type: ignore[assignment]
SPECS_ARE_CALLABLES = hasattr(MLP, "as_mlp_submodule")
if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 reads the name, but binds it only with TransformerEngine
    moe_utils.te_general_gemm = None
GroupedSubmodules: Any = getattr(moe_experts, "GroupedMLPSubmodules", MLPSubmodules)


def transformer_config(**fields: Any) -> TransformerConfig:
    """A ``TransformerConfig`` from the fields that this version knows."""
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    with warnings.catch_warnings():  # its own defaults ("full scope is deprecated") warn
        warnings.simplefilter("ignore")
        return TransformerConfig(**{name: value for name, value in fields.items() if name in known})


def dense_mlp(column: Any, row: Any, activation: Any) -> Any:
    """Spec of a dense MLP made of the linear layers ``column`` (which may hold the norm before it) and ``row``.

    ``activation`` is the class of the module between them, or None: what the config says.
    """
    submodules = MLPSubmodules(linear_fc1=column, linear_fc2=row, activation_func=activation)
    if SPECS_ARE_CALLABLES:
        return functools.partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def moe_mlp(
    router: Callable[..., Any],
    experts: Any,
    linears: tuple[Any, Any],
    shared_linears: tuple[Any, Any],
    activation: Any,
) -> Any:
    """Spec of an MoE layer and, where the config has one, its shared expert.

    Args:
        router: class of the router.
        experts: class of all routed experts of a rank.
        linears: the first and the second linear layer that ``experts`` is made of.
        shared_linears: those of the shared expert.
        activation: class of the module between them, or None: what the config says.
    """
    submodules = GroupedSubmodules if issubclass(experts, TEGroupedMLP) else MLPSubmodules

    def parts(submodules: Any, linears: tuple[Any, Any]) -> Any:
        return submodules(linear_fc1=linears[0], linear_fc2=linears[1], activation_func=activation)

    return _builder(
        MoELayer,
        MoESubmodules(
            experts=_builder(experts, parts(submodules, linears)),
            shared_experts=_builder(SharedExpertMLP, parts(MLPSubmodules, shared_linears)),
            router=router,
        ),
    )


def _builder(module: Any, submodules: Any) -> Any:
    if SPECS_ARE_CALLABLES:
        return functools.partial(module, submodules=submodules)
    return ModuleSpec(module=module, submodules=submodules)
