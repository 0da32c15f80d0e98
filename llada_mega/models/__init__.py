"""Megatron-Core models for block diffusion: dense Llama/Qwen and Ling/LLaDA2 mixture of experts."""

from __future__ import annotations

import warnings

import llada_mega.parallel  # noqa: F401  first: it decides which optional libraries Megatron-Core sees

with warnings.catch_warnings():  # Megatron-Core lists what is not installed: llada-mega doctor does that
    warnings.simplefilter("ignore")
    from llada_mega.models.batch import run_batch
    from llada_mega.models.embedding import EmbeddingNoise, NoisyEmbedding
    from llada_mega.models.logits import RowLosses, chunked_cross_entropy
    from llada_mega.models.model import BlockDiffusionModel
    from llada_mega.models.provider import build_model, load_tensors
    from llada_mega.models.router import discard_expert_load, update_expert_bias

__all__ = [
    "BlockDiffusionModel",
    "EmbeddingNoise",
    "NoisyEmbedding",
    "RowLosses",
    "build_model",
    "chunked_cross_entropy",
    "discard_expert_load",
    "load_tensors",
    "run_batch",
    "update_expert_bias",
]
