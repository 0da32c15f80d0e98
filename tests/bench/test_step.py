"""The benchmark's two steps are the same step, and its count of FLOPs is right."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import published_model
from bench.step import compare, measure, prepare, step_flops
from llada_mega.config.model import ModelConfig
from tests.models import helpers

LENGTH, BLOCK_SIZE = 96, 16


def moe_config() -> ModelConfig:
    """GLM-4-MoE's shared expert is a whole number of experts wide."""
    config = helpers.moe_config()
    return replace(config, moe=replace(config.moe, shared_expert_ffn_hidden_size=48))


def test_both_implementations_make_the_same_loss_and_gradients() -> None:
    found = compare(prepare(moe_config(), [LENGTH], BLOCK_SIZE))
    assert found.loss <= 1e-6
    assert found.gradient <= 1e-5, found.worst
    assert 0 < found.reference_gradient <= 1e-5


def test_the_published_model_does_too() -> None:
    pair = prepare(moe_config(), [LENGTH], BLOCK_SIZE)
    assert abs(pair.published() / pair.reference() - 1) <= 1e-6
    gradients = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in pair.weights.items()}
    expected = published_model.renamed(pair.config, gradients)
    for name, parameter in pair.published_model.named_parameters():
        assert parameter.grad is not None
        difference = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max()
        assert difference <= 1e-5, name


def test_a_wrong_weight_is_seen() -> None:
    pair = prepare(moe_config(), [LENGTH], BLOCK_SIZE)
    with torch.no_grad():
        pair.weights["model.layers.2.mlp.shared_experts.up_proj.weight"][0] += 0.1
    assert compare(pair).gradient > 1e-4


def test_flops_are_those_of_the_matrix_products() -> None:
    """PyTorch counts the reference's linear layers; attention is the library's count, twice more backward."""
    config = moe_config()
    pair = prepare(config, [LENGTH], BLOCK_SIZE)
    with FlopCounterMode(display=False) as counter:
        pair.reference()
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == step_flops(config, 2 * LENGTH, 0, LENGTH)
    area, heads = 1000, config.num_attention_heads * config.head_dim
    attention = step_flops(config, 2 * LENGTH, area, LENGTH) - step_flops(config, 2 * LENGTH, 0, LENGTH)
    assert attention == 3 * config.num_layers * 4 * area * heads


def test_the_report_is_consistent() -> None:
    report = measure(prepare(moe_config(), [LENGTH], BLOCK_SIZE), repeats=2)
    assert report.ratio > 0 and report.peak_mib > 0 and report.reference_peak_mib > 0
    assert abs(report.share_of_floor * LENGTH / report.tokens_per_cpu_second / report.floor_seconds - 1) < 1e-9
