"""Strict, typed reading of a parsed ``config.json``.

The class defaults of published configuration files differ from what the checkpoints need, so a field that decides a
number is taken from the file or refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from llada_mega.errors import CheckpointError

T = TypeVar("T")
TOKEN_IDS = ("mask_token_id", "pad_token_id", "eos_token_id", "bos_token_id")
_MISSING = object()


class Fields:
    """Typed access to a parsed config.json; every complaint names the file and the field."""

    def __init__(self, content: dict[str, Any], location: str, prefix: str = "") -> None:
        self.content, self.location, self.prefix = content, location, prefix

    def fail(self, message: str) -> CheckpointError:
        """The error to raise; ``message`` begins with a field's name."""
        return CheckpointError(f"{self.location}: {self.prefix}{message}")

    def get(self, name: str, kind: type, default: Any = _MISSING) -> Any:
        """The field's value, of type ``kind`` (an int will do for a float); an absent or null field needs a default."""
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

    def count(self, name: str, minimum: int = 1) -> int:
        """An integer of at least ``minimum``."""
        value = self.get(name, int)
        if value < minimum:
            raise self.fail(f"{name}={value} must be {minimum} or more")
        return value

    def refuse(self, name: str, *accepted: Any) -> None:
        """Fails when the field is there with a value that this project does not compute."""
        value = self.content.get(name)
        if value is not None and value not in accepted:
            raise self.fail(f"{name}={value!r} is not supported; use a model without it")

    def agree(self, values: Mapping[str, T | None]) -> T:
        """The value that several fields (name -> value, None where absent) state: one is enough, all must agree."""
        stated = [(name, value) for name, value in values.items() if value is not None]
        if not stated:
            raise self.fail(f"{next(iter(values))} is missing; add it as the model was trained")
        (first, value), *others = stated
        for other, same in others:
            if same != value:
                raise self.fail(f"{first}={value} contradicts {other}={same}; keep what the model was trained with")
        return value

    def nested(self, name: str) -> Fields:
        """The object in a field; an empty one where there is none."""
        return Fields(self.get(name, dict, {}), self.location, f"{self.prefix}{name}.")

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """A token's id; None where there is none. Of several ids that end a turn the first is the model's own."""
        value = self.content.get(name)
        if isinstance(value, list) and value:
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


def family_class(fields: Fields, classes: Mapping[str, str]) -> str:
    """``model_type``, one of the keys of ``classes``; ``architectures`` must name the class that belongs to it."""
    family = fields.get("model_type", str)
    if family not in classes:
        raise fields.fail(f"model_type={family!r} is not supported; use one of {', '.join(classes)}")
    architectures = fields.get("architectures", list, [])
    if architectures and classes[family] not in architectures:
        raise fields.fail(f"architectures={architectures} contradicts model_type={family!r} ({classes[family]})")
    return family


def common_shape(fields: Fields) -> dict[str, Any]:
    """The arguments of ``ModelConfig`` that every family states alike."""
    heads, groups = fields.count("num_attention_heads"), fields.count("num_key_value_heads")
    if heads % groups:
        raise fields.fail(f"num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    fields.get("hidden_act", str)
    fields.refuse("hidden_act", "silu")
    fields.refuse("use_sliding_window", False)
    fields.refuse("quantization_config")
    vocab_size = fields.count("vocab_size")
    return {
        "num_layers": fields.count("num_hidden_layers"),
        "hidden_size": fields.count("hidden_size"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": fields.count("intermediate_size"),
        "vocab_size": vocab_size,
        "max_position_embeddings": fields.count("max_position_embeddings"),
        "rope_theta": _rope_theta(fields),
        "norm_eps": fields.get("rms_norm_eps", float),
        "tie_embeddings": fields.get("tie_word_embeddings", bool),
        "init_std": fields.get("initializer_range", float, 0.02),
        **{name: fields.token_id(name, vocab_size) for name in TOKEN_IDS},
    }


def _rope_theta(fields: Fields) -> float:
    """The rotary base, also in ``rope_parameters`` as transformers 5 writes it; scaled frequencies are refused."""
    bases = {"rope_theta": fields.get("rope_theta", float, None)}
    for name in ("rope_parameters", "rope_scaling"):
        nested = fields.nested(name)
        nested.refuse("rope_type", "default")
        nested.refuse("type", "default")
        bases[f"{name}.rope_theta"] = nested.get("rope_theta", float, None)
    return fields.agree(bases)
