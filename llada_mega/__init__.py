"""Turns autoregressive language models into block-diffusion language models, on Megatron-Core.

``llada_mega.load_model(path)`` opens a model; everything else is the command line's (``llada-mega --help``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llada_mega.api import load_model

__version__ = "0.1.0"
__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: importing torch and Megatron-Core takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llada_mega import api

    return getattr(api, name)
