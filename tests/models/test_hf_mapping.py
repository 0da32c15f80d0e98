"""Names and layouts of Hugging Face tensors."""

from __future__ import annotations

import pytest
import torch

from llada_mega.config.model import ModelConfig
from llada_mega.errors import CheckpointError, ConfigError
from llada_mega.models import build_model, load_tensors
from llada_mega.models.hf_mapping import hf_shapes, hf_to_local, local_names, local_to_hf, model_tensors, stacked_expert
from tests.models.helpers import dense_config, moe_config, randomize

pytestmark = pytest.mark.latest
CONFIGS = {
    "llama": dense_config("llama", tie_embeddings=True),
    "qwen2": dense_config("qwen2", qkv_bias=True),
    "qwen3": dense_config("qwen3", qk_norm=True, head_dim=16),
    "ling": moe_config(num_layers=2),
    "one key/value head a query head": dense_config("llama", num_query_groups=6),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_there_and_back_bit_for_bit(config: ModelConfig) -> None:
    model = build_model(config)
    randomize(model)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("_extra_state")}
    assert sorted(local_names(config)) == sorted(state)
    theirs = dict(local_to_hf(config, state))
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == hf_shapes(config)
    back = dict(hf_to_local(config, theirs.__getitem__))
    assert back.keys() == state.keys()
    for tensor in model_tensors(config):
        assert back[tensor.name].shape == tensor.shape
        assert torch.equal(back[tensor.name], state[tensor.name][: tensor.shape[0]])
    again = dict(local_to_hf(config, back))
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_ling_names() -> None:
    config = moe_config(num_layers=2)
    names = set(hf_shapes(config))
    assert {
        "model.word_embeddings.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.attention.query_key_value.weight",
        "model.layers.0.attention.query_layernorm.weight",
        "model.layers.0.attention.key_layernorm.weight",
        "model.layers.0.attention.dense.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.expert_bias",
        "model.layers.1.mlp.experts.15.gate_proj.weight",
        "model.layers.1.mlp.experts.15.down_proj.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    } <= names
    assert not any(name.startswith("model.layers.2.") for name in names)


def test_query_key_value_rows_are_interleaved_per_key_value_head() -> None:
    config = ModelConfig("llama", num_layers=1, num_attention_heads=4, num_query_groups=2, head_dim=1, hidden_size=2)
    tensors = {"q": torch.arange(0.0, 4.0), "k": torch.arange(10.0, 12.0), "v": torch.arange(20.0, 22.0)}

    def read(name: str) -> torch.Tensor:
        for letter, rows in tensors.items():
            if f"{letter}_proj" in name:
                return rows[:, None].expand(-1, 2)
        return torch.zeros(4, 2)

    ours = dict(hf_to_local(config, read))["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert ours[:, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_stacked_experts() -> None:
    config = moe_config(num_layers=2)
    apart, stacked = hf_shapes(config), hf_shapes(config, stacked_experts=True)
    assert stacked["model.layers.1.mlp.experts.up_proj"] == (16, 24, 48)
    assert stacked["model.layers.1.mlp.experts.down_proj"] == (16, 48, 24)
    assert {name for name in apart if stacked_expert(name) is None} == {n for n in stacked if ".mlp.experts." not in n}
    assert stacked_expert("model.layers.1.mlp.experts.7.up_proj.weight") == ("model.layers.1.mlp.experts.up_proj", 7)
    assert stacked_expert("model.layers.1.mlp.shared_experts.up_proj.weight") is None


def test_contradictions_are_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"model\.architecture=gpt2 .* use one of llama"):
        local_names(dense_config("gpt2"))
    with pytest.raises(ConfigError, match=r"use model\.architecture=llada2_moe"):
        local_names(moe_config(architecture="llama"))


def test_loading_pads_the_vocabulary_with_zeros_and_checks_shapes() -> None:
    config = dense_config()
    source = build_model(config, seed=1)
    theirs = dict(local_to_hf(config, source.state_dict()))
    short = theirs | {name: theirs[name][: config.vocab_size] for name in theirs if "embed" in name or "head" in name}
    target = build_model(config, seed=2)
    load_tensors(target, hf_to_local(config, short.__getitem__))
    table = target.state_dict()["embedding.word_embeddings.weight"]
    assert torch.equal(table[: config.vocab_size], theirs["model.embed_tokens.weight"][: config.vocab_size])
    assert not table[config.vocab_size :].any()

    wrong = short | {"model.norm.weight": torch.ones(7)}
    with pytest.raises(CheckpointError, match=r"decoder\.final_layernorm\.weight has shape \[7\]"):
        load_tensors(target, hf_to_local(config, wrong.__getitem__))
    with pytest.raises(CheckpointError, match=r"tensors are missing, the first is decoder\.final_layernorm\.weight"):
        load_tensors(target, [(n, t) for n, t in hf_to_local(config, short.__getitem__) if "final" not in n])
    with pytest.raises(CheckpointError, match=r"tensor mystery has no place in this model"):
        load_tensors(target, [("mystery", torch.ones(1))])


def test_the_last_stage_of_a_tied_model_loads_the_embedding_table() -> None:
    config = dense_config(tie_embeddings=True)
    source = build_model(config, seed=1)
    last = build_model(config, seed=None, pre_process=False, post_process=True)
    load_tensors(last, hf_to_local(config, dict(local_to_hf(config, source.state_dict())).__getitem__))
    assert torch.equal(last.output_layer.weight, source.embedding.word_embeddings.weight)
