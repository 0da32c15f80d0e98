"""Dense models against transformers' own, fp32."""

from __future__ import annotations

import pytest
import torch
from llada_kernels import IntervalMask

from llada_mega.config.model import ModelConfig
from llada_mega.models import build_model, load_tensors, mask_carrier
from llada_mega.models.hf_mapping import hf_shapes, hf_to_local
from tests.models.helpers import assert_close, dense_config, random_ids

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.latest

CASES = {
    "llama": dense_config("llama", tie_embeddings=True),
    "llama-untied": dense_config("llama", norm_eps=1e-5),
    "qwen2": dense_config("qwen2", qkv_bias=True, tie_embeddings=True),
    "qwen3": dense_config("qwen3", qk_norm=True, head_dim=16),
}


def hugging_face_model(config: ModelConfig) -> torch.nn.Module:
    fields = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attn_implementation": "eager",
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[config.architecture]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**fields))
    with torch.no_grad():
        for parameter in model.parameters():  # the default of 0.02 leaves attention nearly uniform
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_ar_logits_equal_transformers(name: str) -> None:
    config = CASES[name]
    theirs = hugging_face_model(config)
    state = theirs.state_dict()
    assert set(hf_shapes(config)) == set(state) - ({"lm_head.weight"} if config.tie_embeddings else set())
    ours = build_model(config, seed=None).eval()
    load_tensors(ours, hf_to_local(config, state.__getitem__))
    ids = random_ids(config, 40)
    carrier = mask_carrier.pack(IntervalMask.causal([40]))
    with torch.no_grad():
        expected = theirs(ids).logits[0]
        actual = ours(ids, torch.arange(40)[None], carrier)
    assert actual.shape == expected.shape
    assert_close(actual, expected, 1e-5, name)


def test_packed_documents_equal_separate_documents() -> None:
    """Positions restart and documents do not see each other."""
    config = CASES["llama"]
    theirs = hugging_face_model(config)
    ours = build_model(config, seed=None).eval()
    load_tensors(ours, hf_to_local(config, theirs.state_dict().__getitem__))
    ids = random_ids(config, 25)
    with torch.no_grad():
        actual = ours(
            ids, torch.cat([torch.arange(9), torch.arange(16)])[None], mask_carrier.pack(IntervalMask.causal([9, 16]))
        )
        expected = torch.cat([theirs(ids[:, :9]).logits[0], theirs(ids[:, 9:]).logits[0]])
    assert_close(actual, expected, 1e-5)
