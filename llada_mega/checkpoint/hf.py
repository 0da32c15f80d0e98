"""Reading and writing Hugging Face directories with safetensors weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llada_mega.checkpoint.directory import NewDirectory, write_json
from llada_mega.checkpoint.hf_config import DTYPES, parse_config
from llada_mega.checkpoint.source import SourceModel, check_shapes
from llada_mega.checkpoint.storage import MAX_MAPPED_BYTES, sha256
from llada_mega.checkpoint.streaming import PlannedFile, PlannedTensor, split_by_size
from llada_mega.checkpoint.weights import EXPERT_BIAS, stored_dtype
from llada_mega.config.model import ModelConfig
from llada_mega.data.tokenizer import TOKENIZER_FILES
from llada_mega.errors import CheckpointError
from llada_mega.models.hf_mapping import hf_shapes, model_tensors, stacked_expert, vocabulary_names

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
CHECKSUMS = "SHA256SUMS"  # as `sha256sum --check` reads it
_DTYPE_NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def import_hf(directory: Path) -> SourceModel:
    """Open a Hugging Face directory. Headers are checked now, tensors are read when they are asked for.

    Raises:
        CheckpointError: config.json is missing, incomplete, contradictory or asks for something unsupported; a weight
            file is missing or truncated; a tensor is missing, has another shape or no place in the model.
    """
    content = _read_json(directory / CONFIG)
    config = parse_config(content, str(directory / CONFIG))
    reader = _Reader(directory)
    extra_layers = content.get("num_nextn_predict_layers") or 0
    if not isinstance(extra_layers, int) or isinstance(extra_layers, bool):
        raise CheckpointError(
            f"{directory / CONFIG}: num_nextn_predict_layers={extra_layers!r} must be a number of layers"
        )
    is_stacked, notes = check_shapes(config, reader.shapes, directory, extra_layers=extra_layers)
    dtype = _dtype(directory, reader.dtypes)
    embedding, output = vocabulary_names(config)
    has_copy = config.tie_embeddings and output in reader.shapes
    if has_copy and not torch.equal(reader.read(output), reader.read(embedding)):
        raise CheckpointError(
            f"{directory}: tie_word_embeddings=true contradicts {output}, which differs from {embedding}"
        )
    texts = {file: (directory / file).read_text("utf-8") for file in TOKENIZER_FILES if (directory / file).is_file()}
    return SourceModel(
        config,
        reader.read_expert if is_stacked else reader.read,
        dtype,
        directory,
        (directory / CONFIG, *reader.files),
        texts if "tokenizer.json" in texts else {},
        notes,
    )


class _Reader:
    """Tensors of a directory, read one at a time. ``shapes``, ``dtypes`` and ``files`` are known from the headers."""

    def __init__(self, directory: Path) -> None:
        self._shards = {name: directory / file for name, file in _weight_map(directory).items()}
        self.files = sorted(set(self._shards.values()))
        self.shapes, self.dtypes = _read_headers(directory, self._shards)
        self._open_files: dict[Path, Any] = {}
        self._mapped_bytes = 0

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self._read(name, lambda file: file.get_tensor(name))

    def read_expert(self, name: str) -> Tensor:
        """A tensor by its name in the form with separate experts, from one with stacked experts."""
        stacked = stacked_expert(name)
        if stacked is None:
            return self.read(name)
        return self._read(stacked[0], lambda file: file.get_slice(stacked[0])[stacked[1]])

    def _read(self, name: str, get: Callable[[Any], Tensor]) -> Tensor:
        if self._mapped_bytes > MAX_MAPPED_BYTES:  # what a mapped file has shown counts as resident
            self._open_files.clear()
            self._mapped_bytes = 0
        path = self._shards[name]
        with _named_errors(path):
            if path not in self._open_files:
                self._open_files[path] = safe_open(path, framework="pt")
            tensor = get(self._open_files[path])
        self._mapped_bytes += tensor.nbytes
        return tensor


def _dtype(directory: Path, dtypes: dict[str, str]) -> torch.dtype:
    """The one dtype of all weights; the biases of experts may be float32 beside it."""
    found = {dtype for name, dtype in dtypes.items() if not (name.endswith(EXPERT_BIAS) and dtype == "F32")}
    if len(found) > 1:
        raise CheckpointError(f"{directory}: weights of several dtypes ({', '.join(sorted(found))}); convert them")
    name = next(iter(found))
    if name not in _DTYPE_NAMES:
        raise CheckpointError(f"{directory}: weights of dtype {name}; use {', '.join(DTYPES)}")
    return _DTYPE_NAMES[name]


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
    with _named_errors(directory / WEIGHTS), safe_open(directory / WEIGHTS, framework="pt") as file:
        return dict.fromkeys(file.keys(), WEIGHTS)


def _weight_files(directory: Path) -> set[str]:
    """Files that the weights should be in; the index alone when it cannot be read."""
    try:
        return set(_weight_map(directory).values())
    except CheckpointError:
        return {WEIGHTS_INDEX if (directory / WEIGHTS_INDEX).is_file() else WEIGHTS}


def _read_headers(directory: Path, shards: dict[str, Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shape and dtype of every tensor that the files hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for path in sorted(set(shards.values())):
        with _named_errors(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                header = file.get_slice(name)
                shapes[name], dtypes[name] = tuple(header.get_shape()), header.get_dtype()
    for name, path in shards.items():
        if name not in shapes:
            raise CheckpointError(f"{directory}: tensor {name} is missing from {path.name}, where the index puts it")
    return shapes, dtypes


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); download it again") from error


def parse_size(size: int | str) -> int:
    """Bytes of ``"5GB"`` (10^9), ``"500MiB"`` (2^20) or a plain number. Raises CheckpointError."""
    text = str(size).strip().upper()
    unit = next((unit for unit in sorted(_SIZE_UNITS, key=len, reverse=True) if text.endswith(unit)), "")
    try:
        size_bytes = int(float(text.removesuffix(unit)) * _SIZE_UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        size_bytes = 0
    if size_bytes <= 0:
        raise CheckpointError(f"max_shard_size={size!r} is no size; write 5GB or 500MB")
    return size_bytes


def plan_weights(
    directory: Path,
    config: ModelConfig,
    read: Callable[[str], Iterator[Tensor]],
    *,
    dtype: torch.dtype,
    max_shard_size: int,
    stacked_experts: bool,
) -> list[PlannedFile]:
    """The weight files of a Hugging Face directory: one, or numbered shards.

    Args:
        directory: where they go.
        read: Hugging Face name (experts apart) -> pieces that, one after the other along the first axis, are it.
        dtype: of the weights; the biases of experts are float32.
        max_shard_size: bytes of a file; a larger tensor has a file of its own.
        stacked_experts: all experts of a layer in one tensor.
    Raises:
        ConfigError: the model has no Hugging Face form.
    """
    names: dict[str, list[str]] = {}  # name in the file -> names of its parts
    for tensor in model_tensors(config):
        for part in tensor.parts:
            stacked = stacked_expert(part.name) if stacked_experts else None
            names.setdefault(stacked[0] if stacked else part.name, []).append(part.name)
    tensors = [
        PlannedTensor(
            name,
            stored_dtype(name, dtype),
            shape,
            partial(_pieces, read, names[name]),
        )
        for name, shape in hf_shapes(config, stacked_experts=stacked_experts).items()
    ]
    shards = split_by_size(tensors, max_shard_size)
    if len(shards) == 1:
        return [PlannedFile(directory / WEIGHTS, shards[0], {})]
    return [
        PlannedFile(directory / f"model-{index:05d}-of-{len(shards):05d}.safetensors", shard, {})
        for index, shard in enumerate(shards, start=1)
    ]


def _pieces(read: Callable[[str], Iterator[Tensor]], names: list[str]) -> Iterator[Tensor]:
    for name in names:
        yield from read(name)


def seal_hf(
    new: NewDirectory,
    files: list[PlannedFile],
    config: ModelConfig,
    content: dict[str, Any],
    generation: dict[str, Any],
    tokenizer_files: dict[str, str],
) -> None:
    """Complete a Hugging Face directory that has its weights, and give it its name.

    Args:
        new: with all ``files`` in it.
        content, generation: of config.json and generation_config.json.
        tokenizer_files: file name -> text.
    Raises:
        CheckpointError: what was written is not the model, or the disk is full.
    """
    try:
        if len(files) > 1:
            weight_map = {tensor.name: file.path.name for file in files for tensor in file.tensors}
            total = sum(file.nbytes for file in files)
            write_json(new.partial / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(new.partial / CONFIG, content)
        write_json(new.partial / GENERATION_CONFIG, generation)
        for name, text in tokenizer_files.items():
            (new.partial / name).write_text(text, "utf-8")
        checksums = {file.path.name: json.loads(file.sidecar.read_text())["sha256"] for file in files}
        check_shapes(config, _Reader(new.partial).shapes, new.path)
        sidecars = {file.sidecar for file in files}
        for path in new.partial.iterdir():
            if path.name not in (*checksums, CHECKSUMS) and path not in (*sidecars, new.plan):
                checksums[path.name] = sha256(path)
        lines = [f"{digest}  {name}\n" for name, digest in sorted(checksums.items())]
        (new.partial / CHECKSUMS).write_text("".join(lines))
        for sidecar in sidecars:
            sidecar.unlink()
        new.publish()
    except OSError as error:
        raise CheckpointError(f"cannot write {new.path}: {error.strerror or error}") from error


def verify_hf(directory: Path) -> list[str]:
    """All that is wrong with a Hugging Face directory, one line each, as far as its SHA256SUMS tells.

    Raises:
        CheckpointError: it has no checksums.
    """
    path = directory / CHECKSUMS
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {CHECKSUMS}; only directories that convert export wrote have it")
    lines = [line.partition("  ") for line in path.read_text("utf-8").splitlines()]
    listed, expected = {name for _, _, name in lines}, {CONFIG, *_weight_files(directory)}
    problems = [f"{name} is not listed in {CHECKSUMS}" for name in sorted(expected - listed)]
    for digest, _, name in lines:
        if Path(name).name != name or not (directory / name).is_file():
            problems.append(f"{name} is missing")
        elif sha256(directory / name) != digest:
            problems.append(f"{name} has another checksum than when it was written")
    return problems
