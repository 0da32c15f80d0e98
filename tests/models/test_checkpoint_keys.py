"""The keys of a checkpoint, frozen: those of Megatron's TransformerEngine spec, whatever the implementation."""

from __future__ import annotations

from typing import Any

import pytest

from llada_mega.models import build_model
from tests.models.helpers import dense_config, moe_config

pytestmark = pytest.mark.latest

ATTENTION = ["linear_proj.weight", "linear_qkv.layer_norm_weight", "linear_qkv.weight"]
QK_NORM = ["k_layernorm.weight", "q_layernorm.weight"]
DENSE = ["mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
MOE = [
    "mlp.experts.experts.linear_fc1.weight",
    "mlp.experts.experts.linear_fc2.weight",
    "mlp.router.expert_bias",
    "mlp.router.weight",
    "mlp.shared_experts.linear_fc1.weight",
    "mlp.shared_experts.linear_fc2.weight",
    "pre_mlp_layernorm.weight",
]
OUTER = ["decoder.final_layernorm.weight", "embedding.word_embeddings.weight"]


def keys(state: dict[str, Any]) -> list[str]:
    return sorted({entry.key for entry in state.values() if hasattr(entry, "key") and "_extra_state" not in entry.key})


def layer_keys(layer: int, *names: str) -> list[str]:
    return [f"decoder.layers.{layer}.{name}" for name in names]


def attention_keys(layer: int, *names: str) -> list[str]:
    return layer_keys(layer, *(f"self_attention.{name}" for name in names))


def test_dense_keys() -> None:
    state = build_model(dense_config("qwen2", tie_embeddings=True, qkv_bias=True, num_layers=2)).sharded_state_dict()
    expected = list(OUTER)
    for layer in range(2):
        expected += attention_keys(layer, *ATTENTION, "linear_qkv.bias") + layer_keys(layer, *DENSE)
    assert keys(state) == sorted(expected)


def test_moe_keys() -> None:
    state = build_model(moe_config(num_layers=2)).sharded_state_dict()
    expected = [*OUTER, "output_layer.weight"]
    for layer, feed_forward in enumerate((DENSE, MOE)):
        expected += attention_keys(layer, *ATTENTION, *QK_NORM) + layer_keys(layer, *feed_forward)
    assert keys(state) == sorted(expected)


def test_experts_lie_on_an_axis() -> None:
    config = moe_config(num_layers=2)
    state = build_model(config).sharded_state_dict()
    down = [entry for entry in state.values() if entry.key.endswith("experts.experts.linear_fc2.weight")]
    assert len(down) == 16
    assert {entry.global_shape for entry in down} == {(16, config.hidden_size, config.moe.expert_ffn_hidden_size)}
    assert sorted(entry.global_offset[0] for entry in down) == list(range(16))
    up = [entry for entry in state.values() if entry.key.endswith("experts.experts.linear_fc1.weight")]
    gate_and_up = [shard for entry in up for shard in entry.build()]
    assert {shard.global_shape for shard in gate_and_up} == {
        (16, 2 * config.moe.expert_ffn_hidden_size, config.hidden_size)
    }


def test_metadata_cannot_change_the_keys() -> None:
    model = build_model(moe_config(num_layers=2))
    metadata = {"singleton_local_shards": True, "non_homogeneous_layers": False}
    assert keys(model.sharded_state_dict(metadata=metadata)) == keys(model.sharded_state_dict())
