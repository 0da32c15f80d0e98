"""Tiny models and batches for the tests of the models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from llada_kernels import IntervalMask
from torch import Tensor

from llada_mega.config.model import ModelConfig, MoEConfig
from llada_mega.models import BlockDiffusionModel, mask_carrier
from llada_mega.models.hf_mapping import local_names, local_to_hf
from llada_mega.models.router import BalancedRouter
from tests.models import reference

MASK_ID = 3


def dense_config(architecture: str = "llama", **changes: object) -> ModelConfig:
    """Three layers, GQA, vocabulary no multiple of 128."""
    fields = {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "num_query_groups": 2, "head_dim": 8}
    fields |= {"ffn_hidden_size": 80, "vocab_size": 150, "rope_theta": 5000.0, "init_std": 0.15}
    return ModelConfig(architecture=architecture, **(fields | changes))  # type: ignore[arg-type]


def moe_config(**changes: object) -> ModelConfig:
    """Ling 2.0 in small: first layer dense, 2 of 4 groups, 4 of 16 experts, shared expert, half rotary, qk-norm."""
    moe = MoEConfig(16, 4, 4, 2, expert_ffn_hidden_size=24, shared_expert_ffn_hidden_size=40, first_dense_layers=1)
    fields = {"architecture": "llada2_moe", "qk_norm": True, "rotary_percent": 0.5, "moe": moe}
    return dense_config(**(fields | changes))  # type: ignore[arg-type]


def randomize(model: BlockDiffusionModel, seed: int = 0) -> None:
    """Norm weights, biases and expert biases away from their initial 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name or name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.3)
        for module in model.modules():
            if isinstance(module, BalancedRouter) and module.expert_bias is not None:
                bias = torch.randn(module.expert_bias.shape, generator=generator)
                module.expert_bias.copy_(0.2 * bias)


def hf_weights(model: BlockDiffusionModel, requires_grad: bool = False) -> dict[str, Tensor]:
    """The model's weights under Hugging Face names, without vocabulary padding, detached."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if tensor is not None}
    return _unpad(model, state, requires_grad)


def hf_gradients(model: BlockDiffusionModel) -> dict[str, Tensor]:
    """The model's gradients under Hugging Face names (the mapping only moves entries, so it maps gradients too)."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name in local_names(model.model_config):
        if name.endswith("expert_bias"):
            gradients[name] = torch.zeros(1)
    return _unpad(model, gradients, False)


def _unpad(model: BlockDiffusionModel, state: dict[str, Tensor], requires_grad: bool) -> dict[str, Tensor]:
    vocab = model.model_config.vocab_size
    result = {}
    for name, tensor in local_to_hf(model.model_config, state):
        tensor = tensor[:vocab] if "embed" in name or "lm_head" in name else tensor
        result[name] = tensor.clone().requires_grad_(requires_grad and not name.endswith("expert_bias"))
    return result


def random_ids(config: ModelConfig, length: int, seed: int = 0) -> Tensor:
    """int64 [1, length] without MASK."""
    return torch.randint(MASK_ID + 1, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


def noisy_and_clean(config: ModelConfig, document_lengths: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """ids int64 [1, 2L] = [noisy; clean] and masked bool [L] (never empty)."""
    length = sum(document_lengths)
    clean = random_ids(config, length, seed)
    masked = torch.rand(length, generator=torch.Generator().manual_seed(seed + 1)) < 0.5
    masked[0] = True
    return torch.cat([clean.masked_fill(masked, MASK_ID), clean], dim=1), masked


def bdlm_inputs(config: ModelConfig, document_lengths: Sequence[int], block_size: int, seed: int = 0):
    """(ids [1, 2L], positions [1, 2L], mask carrier, masked [L]) of the layout [noisy; clean]."""
    ids, masked = noisy_and_clean(config, document_lengths, seed)
    position = reference.positions(document_lengths).repeat(2)[None]
    carrier = mask_carrier.pack(IntervalMask.block_diffusion(document_lengths, block_size))
    return ids, position, carrier, masked


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Largest difference at most ``tolerance`` times the largest expected value."""
    actual, expected = actual.detach(), expected.detach()
    scale = float(expected.abs().max()) or 1.0
    difference = float((actual - expected).abs().max()) / scale
    assert difference <= tolerance, f"{what} differs by {difference:.2e} (relative), allowed {tolerance:.0e}"
