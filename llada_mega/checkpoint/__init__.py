"""Checkpoints, and conversion from and to Hugging Face and GGUF models."""

import llada_mega.parallel  # noqa: F401  first: it decides which optional libraries Megatron-Core sees
