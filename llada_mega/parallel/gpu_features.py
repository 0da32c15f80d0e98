"""What a configuration may ask of a GPU and its libraries, and whether this machine has it."""

from __future__ import annotations

import torch

from llada_mega.config.checks import require
from llada_mega.config.fp8 import RECIPES
from llada_mega.config.layout import DEEP_EP_DISPATCHERS
from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.errors import ConfigError
from llada_mega.parallel.capabilities import DEEP_EP, TE, choose_implementation, obstacle


def check_gpu_features(model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, fp8: str | None) -> None:
    """Refuse FP8, offloading, recomputation and dispatchers that cannot be had here, each with one line.

    Args:
        model: its implementation may be ``auto``.
        parallel: a layout that ``check_layout`` accepts.
        dtype: of parameters and activations.
        fp8: ``trainer.fp8``, a recipe that ``check_fp8`` accepts.

    Raises:
        ConfigError: naming the key, what is missing and what to set instead.
    """
    implementation = choose_implementation(model.implementation, dtype).name
    if fp8 is not None:
        _needs_te(f"trainer.fp8={fp8}", implementation, "set trainer.fp8=null")
        recipe, here = RECIPES[fp8], torch.cuda.get_device_capability()
        fitting = [name for name, other in RECIPES.items() if other.lowest <= here < other.below]
        require(
            recipe.lowest <= here < recipe.below,
            f"trainer.fp8={fp8} is not for GPUs of compute capability {here[0]}.{here[1]}; "
            f"use {', '.join([*fitting, 'null'])}",
        )
    if parallel.offload_layers:
        key = f"parallel.offload_layers={parallel.offload_layers}"
        _needs_te(key, implementation, "set parallel.offload_layers=0, or recompute with parallel.recompute=selective")
    # Megatron-Core discards the output of these two, with code that is there only with TransformerEngine. The local
    # experts and norms make theirs again in any case.
    if parallel.recompute == "selective":
        for module in sorted({"moe_act", "layernorm"} & set(parallel.recompute_modules)):
            _needs_te(f"parallel.recompute_modules: {module}", implementation, "leave it out")
    if model.is_moe and parallel.dispatcher in DEEP_EP_DISPATCHERS:
        _check_deep_ep(parallel.dispatcher, dtype)


def _needs_te(what: str, implementation: str, advice: str) -> None:
    if implementation != "te":
        reason = obstacle(TE) or "model.implementation=local does not use it"
        raise ConfigError(f"{what} needs TransformerEngine, and {reason}; {advice}")


def _check_deep_ep(dispatcher: str, dtype: torch.dtype) -> None:
    what = f"parallel.dispatcher={dispatcher}"
    reason = obstacle(DEEP_EP)
    if reason is None and dispatcher == "hybridep":
        import deep_ep

        reason = None if hasattr(deep_ep, "HybridEPBuffer") else "the version that is installed has no HybridEPBuffer"
    require(reason is None, f"{what} needs the library deep_ep, and {reason}; use parallel.dispatcher=alltoall")
    require(
        dtype == torch.bfloat16,
        f"{what} sends bfloat16 only, but trainer.dtype={str(dtype).removeprefix('torch.')}; set "
        "trainer.dtype=bfloat16 or parallel.dispatcher=alltoall",
    )
