"""Checkpoints, and conversion from and to Hugging Face and GGUF models."""
