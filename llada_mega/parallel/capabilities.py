"""What this machine offers beyond PyTorch on the CPU, found out once, and what a run makes of it.

TransformerEngine and apex are optional. Megatron-Core takes its optimizer and gradient clipping from TransformerEngine,
then apex, then PyTorch, whichever it can import first; both libraries can be installed and yet be of no use, without a
GPU or without the shared libraries they need. :func:`hide_unusable` makes "can be imported" mean "can be used".
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from dataclasses import dataclass

import torch
from llada_kernels import choose_backend

from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.errors import ConfigError

TE, APEX, DEEP_EP = "transformer_engine", "apex", "deep_ep"
# Of each library, the distribution that has its version and the modules that Megatron-Core asks for.
_DISTRIBUTIONS = {TE: "transformer-engine", APEX: "apex", DEEP_EP: "deep_ep"}
_MODULES = {TE: ("transformer_engine.pytorch",), APEX: ("amp_C", "apex.optimizers"), DEEP_EP: ("deep_ep",)}
_FUSED_WGRAD = "fused_weight_gradient_mlp_cuda"  # the part of apex that adds weight gradients to the fp32 buffer
_hidden: dict[str, str] = {}


@dataclass(frozen=True)
class Choice:
    """What is used, and why that."""

    name: str
    reason: str


def version(distribution: str) -> str | None:
    """Installed version, None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def obstacle(library: str) -> str | None:
    """Why a library cannot be used here; None when it can. Imports the library (seconds) where there is CUDA.

    Installed without its PyTorch part, or a namesake from PyPI in the case of apex, counts as not installed.
    """
    if library in _hidden:
        return _hidden[library]
    if importlib.util.find_spec(library) is None:
        return "it is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        for module in _MODULES[library]:
            importlib.import_module(module)
    except Exception as error:  # a missing shared library is a RuntimeError, an OSError or an AssertionError
        return f"importing it fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return None


def hide_unusable() -> None:
    """Let Megatron-Core, once imported, take what cannot be used here for not installed.

    Does nothing when Megatron-Core is imported already: parts of it that know a library would miss it in others.
    """
    if "megatron.core" in sys.modules:
        return
    for library in (TE, APEX):
        reason = obstacle(library)
        if reason is None or library in _hidden:
            continue
        _hidden[library] = reason
        roots = {module.partition(".")[0] for module in _MODULES[library]}
        for root in roots if library == TE else roots | {_FUSED_WGRAD}:
            sys.modules[root] = None  # type: ignore[assignment]  # imports raise ImportError


def choose_implementation(requested: str, dtype: torch.dtype = torch.float32) -> Choice:
    """Layers of ``model.implementation``: "te" or "local".

    Args:
        requested: auto, local or te.
        dtype: of the parameters.

    Raises:
        ConfigError: ``te`` cannot be used here, or the value is unknown.
    """
    if requested not in ("auto", "local", "te"):
        raise ConfigError(f"model.implementation={requested} is unknown; use auto, local or te")
    if requested == "local":
        return Choice("local", "model.implementation=local")
    reason = obstacle(TE)
    if reason is None and dtype == torch.float64:
        reason = "it does not compute in float64"
    if reason is None:
        return Choice("te", "model.implementation=te" if requested == "te" else "TransformerEngine and CUDA are there")
    if requested == "te":
        raise ConfigError(
            f"model.implementation=te needs TransformerEngine, and {reason}; use model.implementation=auto or local"
        )
    return Choice("local", f"TransformerEngine is not used: {reason}")


def choose_gradient_fusion(requested: bool | None, implementation: str) -> Choice:
    """Whether weight gradients are added to the fp32 gradient buffer inside the matrix product: "on" or "off".

    Args:
        requested: ``parallel.gradient_accumulation_fusion``; None is on where a kernel exists.
        implementation: "te" or "local".

    Raises:
        ConfigError: asked for without a kernel.
    """
    if requested is False:
        return Choice("off", "parallel.gradient_accumulation_fusion=false")
    if implementation == "te":
        return Choice("on", "TransformerEngine has the kernel")
    if obstacle(APEX) is None and importlib.util.find_spec(_FUSED_WGRAD) is not None:
        return Choice("on", "apex has the kernel")
    if requested:
        raise ConfigError(
            "parallel.gradient_accumulation_fusion=true needs a kernel of TransformerEngine (model.implementation=te) "
            "or apex; set parallel.gradient_accumulation_fusion=null or false"
        )
    return Choice("off", "neither TransformerEngine's layers nor apex is used")


@dataclass(frozen=True)
class Software:
    """What a run uses of this machine's software: the section ``software`` of its ``config.yaml``."""

    implementation: str  # te | local
    optimizer: str  # transformer_engine | apex | torch, like norm and clip
    norm: str
    clip: str
    gradient_accumulation_fusion: bool
    attention_backend: str
    versions: dict[str, str]


def choose_software(model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> Software:
    """What ``model`` under ``parallel`` uses here.

    Raises:
        ConfigError: what is asked for is not there.
    """
    implementation = choose_implementation(model.implementation, dtype).name
    fused = choose_gradient_fusion(parallel.gradient_accumulation_fusion, implementation).name == "on"
    return Software(
        implementation=implementation,
        optimizer=optimizer_library(),
        norm=norm_library(implementation),
        clip=clip_library(),
        gradient_accumulation_fusion=fused,
        attention_backend=choose_attention(model, dtype).name,
        versions=versions(),
    )


def choose_attention(model: ModelConfig, dtype: torch.dtype) -> Choice:
    """The attention backend for the queries of ``model``.

    Raises:
        ConfigError: ``model.attention_backend`` cannot serve them here.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return Choice(*choose_backend(model.attention_backend, device, dtype, model.head_dim))
    except ValueError as error:
        raise ConfigError(f"model.attention_backend={model.attention_backend}: {error}") from error


def versions() -> dict[str, str]:
    """Versions of Python, the libraries that computations go through, and CUDA, where there."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for distribution in ("megatron-core", *_DISTRIBUTIONS.values(), "nvidia-cudnn-frontend", "triton"):
        if (installed := version(distribution)) is not None:
            found[distribution] = installed
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "device": torch.cuda.get_device_name()}
    return found


def optimizer_library() -> str:
    """Where Megatron-Core took its Adam from: transformer_engine, apex or torch."""
    from megatron.core import optimizer

    return _library_of(optimizer.Adam)


def norm_library(implementation: str) -> str:
    """Where the norms of the layers come from; apex has no RMSNorm that Megatron-Core uses."""
    return TE if implementation == "te" else "torch"


def clip_library() -> str:
    """Where Megatron-Core took the norm and the scaling of gradient clipping from."""
    from megatron.core.optimizer import clip_grads

    return _library_of(clip_grads.l2_norm_impl)


def _library_of(function: object) -> str:
    module = getattr(function, "__module__", "")
    if module.startswith(TE):  # transformer_engine_torch too, its compiled part
        return TE
    return APEX if module.startswith((APEX, "amp_C")) else "torch"
