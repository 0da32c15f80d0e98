"""``config.json`` of the dense Hugging Face families (llama, qwen2, qwen3) <-> :class:`ModelConfig`.

Reading is strict: the class defaults of published configuration files differ from what the checkpoints need, so a field
that decides a number is taken from the file or refused, never guessed.
"""

from __future__ import annotations

from typing import Any

import torch

from llada_mega.config.model import ModelConfig
from llada_mega.errors import CheckpointError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MISSING = object()


class _Fields:
    """Typed access to a parsed config.json; every complaint names the file and the field."""

    def __init__(self, content: dict[str, Any], location: str) -> None:
        self.content, self.location = content, location

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.location}: {message}")

    def get(self, name: str, kind: type, default: Any = _MISSING) -> Any:
        value = self.content.get(name)
        if value is None:
            if default is _MISSING:
                raise self.fail(f"{name} is missing; add it as the model was trained")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fail(f"{name}={value!r} must be of type {kind.__name__}")
        return value

    def positive(self, name: str, default: Any = _MISSING) -> int:
        value = self.get(name, int, default)
        if value <= 0:
            raise self.fail(f"{name}={value} must be positive")
        return value

    def refuse(self, name: str, *accepted: Any) -> None:
        """Fails when the field is there with a value that this project does not compute."""
        value = self.content.get(name)
        if value is not None and value not in accepted:
            raise self.fail(f"{name}={value!r} is not supported; use a model without it")

    def token_id(self, name: str, vocab_size: int) -> int | None:
        value = self.content.get(name)
        if isinstance(value, list) and value:  # several ids that end a turn: the first is the model's own
            value = value[0]
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fail(f"{name}={value!r} must be a token id")
        if value == -1:  # written by some exporters for "none"
            return None
        if not 0 <= value < vocab_size:
            raise self.fail(f"{name}={value} is outside vocab_size={vocab_size}")
        return value


def parse_config(content: dict[str, Any], location: str) -> ModelConfig:
    """Shape of the model that a parsed ``config.json`` describes.

    Args:
        content: the parsed file.
        location: its name in error messages.
    Raises:
        CheckpointError: a field is missing, has the wrong type, contradicts another one, or asks for something that is
            not supported here (rotary scaling, sliding windows, other biases, quantised weights, other families).
    """
    fields = _Fields(content, location)
    family = _family(fields)
    _refuse_unsupported(fields, family)
    hidden_size, heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    groups = fields.positive("num_key_value_heads")
    if heads % groups:
        raise fields.fail(f"num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    vocab_size = fields.positive("vocab_size")
    return ModelConfig(
        architecture=family,
        num_layers=fields.positive("num_hidden_layers"),
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=_head_dim(fields, family, hidden_size, heads),
        ffn_hidden_size=fields.positive("intermediate_size"),
        vocab_size=vocab_size,
        max_position_embeddings=fields.positive("max_position_embeddings"),
        rope_theta=_rope_theta(fields),
        norm_eps=fields.get("rms_norm_eps", float),
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        tie_embeddings=fields.get("tie_word_embeddings", bool),
        init_std=fields.get("initializer_range", float, 0.02),
        mask_token_id=fields.token_id("mask_token_id", vocab_size),
        pad_token_id=fields.token_id("pad_token_id", vocab_size),
        eos_token_id=fields.token_id("eos_token_id", vocab_size),
        bos_token_id=fields.token_id("bos_token_id", vocab_size),
    )


def _family(fields: _Fields) -> str:
    family = fields.get("model_type", str)
    if family not in ARCHITECTURES:
        raise fields.fail(f"model_type={family!r} is not supported; use one of {', '.join(ARCHITECTURES)}")
    architectures = fields.get("architectures", list, [])
    if architectures and ARCHITECTURES[family] not in architectures:
        raise fields.fail(f"architectures={architectures} contradicts model_type={family!r} ({ARCHITECTURES[family]})")
    return family


def _refuse_unsupported(fields: _Fields, family: str) -> None:
    fields.refuse("hidden_act", "silu")
    fields.get("hidden_act", str)
    fields.refuse("attention_bias", *([True] if family == "qwen2" else []), False)
    for name in ("mlp_bias", "use_sliding_window"):
        fields.refuse(name, False)
    fields.refuse("partial_rotary_factor", 1.0)
    fields.refuse("quantization_config")
    if family == "llama":
        fields.refuse("sliding_window")
    window_layers = set(fields.get("layer_types", list, [])) - {"full_attention"}
    if window_layers:
        raise fields.fail(f"layer_types has {sorted(window_layers)}, which is not supported; use full_attention")
    scaling = fields.get("rope_scaling", dict, {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise fields.fail(f"rope_scaling of type {kind!r} is not supported; use a model without it")


def _head_dim(fields: _Fields, family: str, hidden_size: int, heads: int) -> int:
    """``head_dim``, which llama and qwen2 may leave out (then hidden_size / num_attention_heads); qwen3 may not."""
    if fields.content.get("head_dim") is not None or family == "qwen3":
        head_dim = fields.positive("head_dim")
    elif hidden_size % heads:
        raise fields.fail(f"hidden_size={hidden_size} is no multiple of num_attention_heads={heads}; add head_dim")
    else:
        head_dim = hidden_size // heads
    if family == "qwen2" and head_dim * heads != hidden_size:
        raise fields.fail(f"head_dim={head_dim} contradicts hidden_size={hidden_size} / num_attention_heads={heads}")
    if head_dim % 2:
        raise fields.fail(f"head_dim={head_dim} must be even: the rotary embedding rotates pairs of channels")
    return head_dim


def _rope_theta(fields: _Fields) -> float:
    """The rotary base: ``rope_theta``, or ``rope_parameters.rope_theta`` as transformers 5 writes it."""
    parameters = fields.get("rope_parameters", dict, {})
    if parameters.get("rope_type", "default") != "default":
        raise fields.fail(f"rope_parameters.rope_type={parameters['rope_type']!r} is not supported; use 'default'")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise fields.fail("rope_parameters.partial_rotary_factor is not supported; use a model without it")
    nested = _Fields(parameters, f"{fields.location}: rope_parameters")
    if parameters.get("rope_theta") is None:
        return fields.get("rope_theta", float)
    theta = nested.get("rope_theta", float)
    if fields.get("rope_theta", float, theta) != theta:
        raise fields.fail(f"rope_theta={fields.content['rope_theta']} contradicts rope_parameters.rope_theta={theta}")
    return theta


def render_config(config: ModelConfig, dtype: torch.dtype, block_size: int | None) -> dict[str, Any]:
    """``config.json`` that transformers (4 and 5) reads, with ``mask_token_id`` and ``block_size`` for decoding.

    Args:
        config: a dense model.
        dtype: of the exported weights.
        block_size: tokens of a decoding block; None leaves the field out.
    Raises:
        CheckpointError: the model belongs to no dense Hugging Face family.
    """
    if config.is_moe or config.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"model.architecture={config.architecture} cannot be exported; use one of {', '.join(ARCHITECTURES)}"
        )
    traits = {"qk_norm": config.architecture == "qwen3", "qkv_bias": config.architecture == "qwen2"}
    for name, expected in traits.items():
        if getattr(config, name) != expected:
            raise CheckpointError(
                f"model.{name}={getattr(config, name)} does not fit model.architecture={config.architecture}, "
                f"which has {name}={expected}"
            )
    if config.rotary_percent != 1.0:
        raise CheckpointError(f"model.rotary_percent={config.rotary_percent} cannot be exported; use 1.0")
    name = next(name for name, known in DTYPES.items() if known == dtype)
    content: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.architecture]],
        "model_type": config.architecture,
        "dtype": name,
        "torch_dtype": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "use_cache": True,
    }
    if config.architecture == "qwen2":
        del content["head_dim"]  # always hidden_size / num_attention_heads there
    else:
        content["attention_bias"] = False
    if config.architecture == "llama":
        content["mlp_bias"] = False
    else:
        content["use_sliding_window"] = False
    for field in ("mask_token_id", "pad_token_id", "eos_token_id", "bos_token_id"):
        if getattr(config, field) is not None:
            content[field] = getattr(config, field)
    if block_size is not None:
        content["block_size"] = block_size
    return content


def render_generation_config(config: ModelConfig) -> dict[str, Any]:
    """``generation_config.json``: the special ids, greedy."""
    content: dict[str, Any] = {"do_sample": False}
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, field) is not None:
            content[field] = getattr(config, field)
    return content
