"""Hugging Face directories: dense llama, qwen2 and qwen3 models with safetensors weights, in and out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llada_mega.checkpoint.hf_config import DTYPES, parse_config, render_config, render_generation_config
from llada_mega.checkpoint.source import EMBEDDING, OUTPUT, SourceModel, check_shapes
from llada_mega.config.model import ModelConfig
from llada_mega.data.tokenizer import TOKENIZER_FILES
from llada_mega.errors import CheckpointError

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def import_hf(directory: Path) -> SourceModel:
    """Open a Hugging Face directory. Headers are checked now, tensors are read when they are asked for.

    Raises:
        CheckpointError: config.json is missing, incomplete, contradictory or asks for something unsupported; a weight
            file is missing or truncated; a tensor is missing, has another shape or no place in the model.
    """
    config = parse_config(_read_json(directory / CONFIG), str(directory / CONFIG))
    shards = {name: directory / file for name, file in _weight_map(directory).items()}
    shapes, dtypes = _read_headers(directory, shards)
    check_shapes(config, shapes, directory)
    if len(set(dtypes.values())) > 1:
        raise CheckpointError(f"{directory}: weights of several dtypes ({sorted(set(dtypes.values()))}); convert them")
    name = dtypes[EMBEDDING].lower()
    names = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    if name not in names:
        raise CheckpointError(f"{directory}: weights of dtype {name}; use {', '.join(DTYPES)}")

    def read(tensor: str) -> Tensor:
        with _open(shards[tensor]) as file:
            return file.get_tensor(tensor)

    if config.tie_embeddings and OUTPUT in shards and not torch.equal(read(OUTPUT), read(EMBEDDING)):
        raise CheckpointError(
            f"{directory}: tie_word_embeddings=true contradicts {OUTPUT}, which differs from {EMBEDDING}"
        )
    files = {file: (directory / file).read_text("utf-8") for file in TOKENIZER_FILES if (directory / file).is_file()}
    return SourceModel(config, read, names[name], directory, files if "tokenizer.json" in files else {})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {path.parent} a Hugging Face directory?") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or from the only file."""
    if (directory / WEIGHTS_INDEX).is_file():
        weight_map = _read_json(directory / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{directory / WEIGHTS_INDEX}: weight_map is missing")
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise CheckpointError(f"{directory / WEIGHTS_INDEX}: {file!r} is no plain file name")
            if not (directory / file).is_file():
                raise CheckpointError(f"{directory}: shard {file} is missing; complete the download")
        return weight_map
    if not (directory / WEIGHTS).is_file():
        raise CheckpointError(f"{directory} has neither {WEIGHTS} nor {WEIGHTS_INDEX}; only safetensors are read")
    with _open(directory / WEIGHTS) as file:
        return dict.fromkeys(file.keys(), WEIGHTS)


def _read_headers(directory: Path, shards: dict[str, Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shape and dtype of every tensor that the files hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for path in sorted(set(shards.values())):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                header = file.get_slice(name)
                shapes[name], dtypes[name] = tuple(header.get_shape()), header.get_dtype()
    for name, path in shards.items():
        if name not in shapes:
            raise CheckpointError(f"{directory}: tensor {name} is missing from {path.name}, where the index puts it")
    return shapes, dtypes


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); download it again") from error


def parse_size(size: int | str) -> int:
    """Bytes of ``"5GB"`` (10^9), ``"500MiB"`` (2^20) or a plain number. Raises CheckpointError."""
    text = str(size).strip().upper()
    unit = next((unit for unit in sorted(_SIZE_UNITS, key=len, reverse=True) if text.endswith(unit)), "")
    try:
        size_bytes = int(float(text.removesuffix(unit)) * _SIZE_UNITS.get(unit, 1))
    except ValueError:
        size_bytes = 0
    if size_bytes <= 0:
        raise CheckpointError(f"max_shard_size={size!r} is no size; write 5GB or 500MB")
    return size_bytes


def export_hf(
    directory: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    block_size: int | None = None,
    tokenizer_files: dict[str, str] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write a directory that plain transformers loads. It appears under its name only when it is whole.

    Args:
        directory: must not exist, or be empty, or with ``overwrite`` be a Hugging Face directory.
        config: a dense model.
        tensors: (Hugging Face name, tensor), stored as ``dtype``.
        dtype: float32, bfloat16 or float16.
        block_size: decoding block, written into config.json.
        tokenizer_files: file name -> text.
        max_shard_size: bytes, or a string as :func:`parse_size` takes it.
        overwrite: replace what is there, once the new directory is whole.
    Raises:
        CheckpointError: the directory is in use or cannot be written, the model has no Hugging Face family, or the
            tensors are not its.
    """
    content, limit = render_config(config, dtype, block_size), parse_size(max_shard_size)
    replaced = overwrite and (directory / CONFIG).is_file()
    if directory.exists() and not replaced and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists and is not empty; choose another output or remove it")
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_json(partial / CONFIG, content)
        _write_json(partial / GENERATION_CONFIG, render_generation_config(config))
        for name, text in (tokenizer_files or {}).items():
            (partial / name).write_text(text, "utf-8")
        _write_shards(partial, ((name, tensor.to(dtype)) for name, tensor in tensors), limit)
        readable = (partial / CONFIG).stat().st_mode
        for file in partial.glob("*.safetensors"):  # safetensors makes its files private
            file.chmod(readable)
        shapes, _ = _read_headers(partial, {name: partial / file for name, file in _weight_map(partial).items()})
        check_shapes(config, shapes, directory)
        if directory.exists():
            shutil.rmtree(directory)
        partial.replace(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {directory}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> None:
    """One file, or numbered shards of at most ``limit`` bytes (a larger tensor has a shard of its own) and an index."""
    shard_names: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    filled = total = 0

    def flush() -> None:
        save_file(shard, directory / f"shard-{len(shard_names):05d}", metadata={"format": "pt"})
        shard_names.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and filled + size > limit:
            flush()
            filled = 0
        shard[name] = tensor.contiguous()
        filled, total = filled + size, total + size
    flush()
    count = len(shard_names)
    if count == 1:
        (directory / "shard-00000").replace(directory / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shard_names):
        file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        (directory / f"shard-{index:05d}").replace(directory / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(directory / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
