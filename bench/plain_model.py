"""The step of block-diffusion training as published trainers write it: plain PyTorch, used to compare and to check.

A dense boolean mask of [2L, 2L] for ``scaled_dot_product_attention``, a loop over experts that gathers the tokens of
each, logits at all noisy positions. Weights are a dict under Hugging Face names (LLaDA2); in float64 it is the oracle.

Legend: L tokens, S = 2L positions, H hidden, N query heads, G key heads, D head dim, T tokens, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llada_mega.config.model import ModelConfig

Weights = Mapping[str, Tensor]


def dense_mask(document_lengths: Sequence[int], block_size: int) -> Tensor:
    """Equation (3) of arXiv 2512.15745 over [noisy ; clean], blocks from the document's start: bool [2L, 2L]."""
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(document_lengths)])
    block = torch.cat([torch.arange(n) // block_size for n in document_lengths])
    same = document[:, None] == document[None, :]
    within, before = same & (block[:, None] == block[None, :]), same & (block[:, None] > block[None, :])
    return torch.cat([torch.cat([within, before], 1), torch.cat([torch.zeros_like(same), before | within], 1)])


def loss(
    weights: Weights,
    config: ModelConfig,
    ids_S: Tensor,
    positions_S: Tensor,
    mask_SS: Tensor,
    labels_L: Tensor,
    weights_L: Tensor,
) -> Tensor:
    """Sum over noisy positions of weight x cross entropy; a weight is 0 where nothing is masked."""
    hidden_SH = weights["model.word_embeddings.weight"][ids_S]
    cos_SD, sin_SD = _rotary(positions_S, config)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        normed = _norm(hidden_SH, weights[f"{prefix}.input_layernorm.weight"], config)
        hidden_SH = hidden_SH + _attention(normed, weights, f"{prefix}.attention", config, cos_SD, sin_SD, mask_SS)
        normed = _norm(hidden_SH, weights[f"{prefix}.post_attention_layernorm.weight"], config)
        network = _experts if config.is_moe_layer(layer) else _swiglu
        hidden_SH = hidden_SH + network(normed, weights, f"{prefix}.mlp", config)
    hidden_SH = _norm(hidden_SH, weights["model.norm.weight"], config)
    logits_LV = F.linear(hidden_SH[: len(labels_L)], weights["lm_head.weight"])
    return (F.cross_entropy(_wide(logits_LV), labels_L, reduction="none") * weights_L).sum()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(hidden: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    wide = _wide(hidden)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + config.norm_eps)
    return weight * wide.to(hidden.dtype)


def _rotary(positions_S: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    channels = int(config.head_dim * config.rotary_percent)
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, channels, 2) / channels)
    angle_SD = (positions_S[:, None] * frequency).repeat(1, 2)
    return angle_SD.cos(), angle_SD.sin()


def _rotate(x_NSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    turning, rest = x_NSD.split([cos_SD.shape[1], x_NSD.shape[2] - cos_SD.shape[1]], -1)
    first, second = turning.chunk(2, -1)
    return torch.cat([turning * cos_SD + torch.cat([-second, first], -1) * sin_SD, rest], -1)


def _attention(
    hidden_SH: Tensor, w: Weights, prefix: str, config: ModelConfig, cos: Tensor, sin: Tensor, mask_SS: Tensor
) -> Tensor:
    heads, groups, dim = config.num_attention_heads, config.num_query_groups, config.head_dim
    rows = F.linear(hidden_SH, w[f"{prefix}.query_key_value.weight"]).view(len(hidden_SH), -1, dim).transpose(0, 1)
    query, key, value = rows.split([heads, groups, groups])
    if config.qk_norm:
        query = _norm(query, w[f"{prefix}.query_layernorm.weight"], config)
        key = _norm(key, w[f"{prefix}.key_layernorm.weight"], config)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    key, value = (x.repeat_interleave(heads // groups, 0) for x in (key, value))
    output_NSD = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask_SS)[0]
    return F.linear(output_NSD.transpose(0, 1).flatten(1), w[f"{prefix}.dense.weight"])


def _swiglu(x: Tensor, w: Weights, prefix: str, config: ModelConfig) -> Tensor:
    gate, up = F.linear(x, w[f"{prefix}.gate_proj.weight"]), F.linear(x, w[f"{prefix}.up_proj.weight"])
    return F.linear(F.silu(gate) * up, w[f"{prefix}.down_proj.weight"])


def _experts(x_TH: Tensor, w: Weights, prefix: str, config: ModelConfig) -> Tensor:
    chosen_TK, share_TK = _route(x_TH, w, prefix, config)
    output_TH = torch.zeros_like(x_TH)
    for expert in range(config.moe.num_experts):
        token, slot = (chosen_TK == expert).nonzero(as_tuple=True)
        if token.numel():
            found = _swiglu(x_TH[token], w, f"{prefix}.experts.{expert}", config) * share_TK[token, slot, None]
            output_TH.index_add_(0, token, found)
    return output_TH + _swiglu(x_TH, w, f"{prefix}.shared_experts", config)


def _route(x_TH: Tensor, w: Weights, prefix: str, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Chosen experts [T, K] and their shares [T, K]: sigmoids, biased for the choice, groups by their best two."""
    moe = config.moe
    score_TE = torch.sigmoid(F.linear(_wide(x_TH), _wide(w[f"{prefix}.gate.weight"])))
    biased_TGN = (score_TE + w[f"{prefix}.gate.expert_bias"]).unflatten(1, (moe.num_groups, -1))
    best_TG = biased_TGN.topk(2, dim=-1).values.sum(-1).topk(moe.group_top_k, dim=-1).indices
    open_TG = torch.zeros(biased_TGN.shape[:2], dtype=torch.bool).scatter(1, best_TG, True)
    chosen_TK = biased_TGN.masked_fill(~open_TG[..., None], -torch.inf).flatten(1).topk(moe.top_k, dim=-1).indices
    share_TK = score_TE.gather(1, chosen_TK)
    return chosen_TK, share_TK / share_TK.sum(-1, keepdim=True) * moe.routed_scaling_factor
