"""Tiny models on disk, as transformers and the tokenizers library write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

transformers = pytest.importorskip("transformers")

FIELDS: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": True, "head_dim": 8},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
    "qwen3_moe": {
        "tie_word_embeddings": False,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
}

# Overrides that describe save_model(directory) after its import: one token more, the MASK.
IMPORTED_LLAMA = [
    "model.num_layers=2",
    "model.hidden_size=48",
    "model.num_attention_heads=6",
    "model.num_query_groups=2",
    "model.head_dim=8",
    "model.ffn_hidden_size=80",
    "model.vocab_size=301",
    "model.mask_token_id=300",
    "model.max_position_embeddings=256",
    "model.rope_theta=5000.0",
    "model.norm_eps=1e-5",
    "model.bos_token_id=1",
    "model.eos_token_id=2",
    "model.pad_token_id=2",
    "model.tie_embeddings=true",
]


def hugging_face_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of a family; every tensor, norms and biases too, is away from its initial value."""
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}
    config = getattr(transformers, f"{names[family]}Config")(**(FIELDS | FAMILIES[family] | changes))
    torch.manual_seed(1)
    model = getattr(transformers, f"{names[family]}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model.eval().to(dtype)


def save_model(directory: Path, family: str = "llama", *, size: int | None = 300, **changes: Any) -> Any:
    """Write a model and, with ``size``, a tokenizer of that many tokens; returns the transformers model."""
    max_shard_size = changes.pop("max_shard_size", "5GB")
    model = hugging_face_model(family, **changes)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if size is not None:
        save_tokenizer(directory, size)
    return model


def save_tokenizer(directory: Path, size: int) -> None:
    """A byte-level BPE: <unk>, <s>, </s>, 256 bytes, then merges of the letter a with others up to ``size`` tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    merges = []
    for letter in alphabet:
        if len(vocabulary) < size:
            vocabulary["a" + letter] = len(vocabulary)
            merges.append(("a", letter))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
