"""The MASK token of a vocabulary that has none.

Its row is the mean of the embedding table (and, where the output is untied, the mean of the output rows): deterministic
and never zero. A zero row makes the first step explode: with a fully masked block every hidden state is zero, and
RMSNorm multiplies the gradient by 1/sqrt(eps) in each layer. Measured on SmolLM2-135M: the gradient norm of one such
backward pass is not finite with a zero row and about 150 with the mean. Training at block 8 on 2 x 128 tokens a step,
masked cross entropy on held-out windows (block 8 / block 1, nats; one run each, so differences of 0.1 mean little):

==================================  ===========  ===========  ===========
row                                 before       18 steps     45 steps
==================================  ===========  ===========  ===========
mean                                9.21 / 5.94  6.18 / 4.64
zero, with embedding noise          9.49 / 5.65  6.47 / 4.33
random, std of the table (3 draws)  8.52 to 9.64 5.90 to 6.06
mean (other data and windows)       9.20 / 6.40               5.92 / 4.19
random (other data and windows)     8.96 / 9.31               5.92 / 3.88
==================================  ===========  ===========  ===========

A random row is ahead early and no better at block 8 later; the mean needs no seed and starts where the model is.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import tokenizers
from torch import Tensor

from llada_mega.checkpoint.source import SourceModel
from llada_mega.errors import CheckpointError
from llada_mega.models.hf_mapping import vocabulary_names

MASK_TOKEN = "<|mask|>"
_ROWS = 4096  # are summed in float64 at a time
_KNOWN_NAMES = (MASK_TOKEN, "<|MASK|>", "[MASK]", "<mask>", "<|mdm_mask|>")


def ensure_mask_token(source: SourceModel, mask_token_id: int | None = None) -> SourceModel:
    """The model with a MASK token: its own if it names one, otherwise a new one.

    A MASK that the configuration, the tokenizer or the caller names is kept as it is, embedding included. A new one
    takes the tokenizer's next id; the embedding table grows by a row unless it has an unused one there.

    Args:
        mask_token_id: the MASK token, where config.json does not name it.
    Raises:
        CheckpointError: the tokenizer has more tokens than the model, or no MASK at the id that the model names; or
            which token is MASK cannot be known.
    """
    config, location = source.config, source.location
    if mask_token_id is not None:
        if config.mask_token_id not in (None, mask_token_id):
            raise CheckpointError(
                f"mask_token_id={mask_token_id} contradicts {location}, where it is {config.mask_token_id}"
            )
        if not 0 <= mask_token_id < config.vocab_size:
            raise CheckpointError(f"mask_token_id={mask_token_id} is outside the vocabulary of {config.vocab_size}")
        config = replace(config, mask_token_id=mask_token_id)
        source = replace(source, config=config)
    if not source.tokenizer_files:
        if config.mask_token_id is not None:
            return source
        if config.is_moe:  # the published vocabularies hold reserved rows, one of which it is
            raise CheckpointError(
                f"{location} has no tokenizer and no mask_token_id; add its tokenizer or give mask_token_id="
                f" (156895 for Ling 2.0 and LLaDA2)"
            )
        return _with_row(source, config.vocab_size, {})
    vocabulary = _vocabulary(source)
    size = max(vocabulary.values()) + 1
    if size > config.vocab_size:
        raise CheckpointError(
            f"{location}: tokenizer.json has {size} tokens, but vocab_size={config.vocab_size}; "
            f"they do not belong together"
        )
    settings = _load(source, "tokenizer_config.json")
    name = _name_of(settings.get("mask_token"), vocabulary)
    if config.mask_token_id is not None:
        by_id = {token_id: token for token, token_id in vocabulary.items()}
        if name is not None and vocabulary[name] != config.mask_token_id:
            raise CheckpointError(
                f"{location}: mask_token_id={config.mask_token_id} contradicts the tokenizer, where {name} is "
                f"{vocabulary[name]}"
            )
        if config.mask_token_id in by_id:
            return replace(source, tokenizer_files=_declare(source, by_id[config.mask_token_id], config.mask_token_id))
        raise CheckpointError(f"{location}: mask_token_id={config.mask_token_id} is not in tokenizer.json")
    name = name or next((known for known in _KNOWN_NAMES if known in vocabulary), None)
    if name is not None:
        files = _declare(source, name, vocabulary[name])
        return replace(source, config=replace(config, mask_token_id=vocabulary[name]), tokenizer_files=files)
    files = _declare(source, MASK_TOKEN, size)
    content = json.loads(files["tokenizer.json"])
    content.setdefault("added_tokens", []).append({"id": size, **_token(MASK_TOKEN)})
    files["tokenizer.json"] = json.dumps(content, ensure_ascii=False, indent=2)
    return _with_row(source, size, files)


def _vocabulary(source: SourceModel) -> dict[str, int]:
    try:
        backend = tokenizers.Tokenizer.from_str(source.tokenizer_files["tokenizer.json"])
    except Exception as error:  # the library raises bare Exception for a damaged file
        raise CheckpointError(f"{source.location}/tokenizer.json cannot be read: {error}") from error
    return backend.get_vocab(with_added_tokens=True)


def _load(source: SourceModel, name: str) -> dict[str, Any]:
    try:
        content = json.loads(source.tokenizer_files.get(name, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{source.location / name} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _name_of(token: Any, vocabulary: dict[str, int]) -> str | None:
    """Text of a special token as tokenizer_config.json writes it: a string, or an object with ``content``."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text in vocabulary else None


def _token(name: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": name, **flags, "special": True}


def _declare(source: SourceModel, name: str, token_id: int) -> dict[str, str]:
    """The tokenizer's companion files with the mask token named in them."""
    files = dict(source.tokenizer_files)
    settings = _load(source, "tokenizer_config.json")
    settings["mask_token"] = name
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"].setdefault(str(token_id), _token(name))
    files["tokenizer_config.json"] = json.dumps(settings, ensure_ascii=False, indent=2)
    if "special_tokens_map.json" in files:
        names = _load(source, "special_tokens_map.json") | {"mask_token": name}
        files["special_tokens_map.json"] = json.dumps(names, ensure_ascii=False, indent=2)
    return files


def _with_row(source: SourceModel, mask_token_id: int, files: dict[str, str]) -> SourceModel:
    """``source`` with the mean of the rows below ``mask_token_id`` in that row of the embedding and output tables."""
    vocab_size = max(source.config.vocab_size, mask_token_id + 1)
    config = replace(source.config, vocab_size=vocab_size, mask_token_id=mask_token_id)

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        if name not in vocabulary_names(config):
            return tensor
        table = tensor.new_empty(vocab_size, tensor.shape[1])
        table[: len(tensor)] = tensor
        total = sum(rows.double().sum(0) for rows in tensor[:mask_token_id].split(_ROWS))
        table[mask_token_id] = total / mask_token_id
        return table

    return replace(source, config=config, read=read, tokenizer_files=files)
