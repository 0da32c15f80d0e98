"""An independent model in plain PyTorch, written from the published descriptions; nothing here uses Megatron-Core.

Weights are a dict under Hugging Face names, the mask is dense. Legend: B batch, S rows, H hidden, N heads, G key/value
heads, D head dimension, E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llada_mega.config.model import ModelConfig

Weights = Mapping[str, Tensor]


def equation_3(document_lengths: Sequence[int], block_size: int) -> Tensor:
    """Dense bool [2L, 2L] over [noisy; clean] from arXiv 2512.15745 eq. (3), blocks counted from the document start."""
    document = torch.tensor([i for i, n in enumerate(document_lengths) for _ in range(n)])
    block = torch.tensor([k // block_size for n in document_lengths for k in range(n)])
    same_document = document[:, None] == document[None, :]
    noisy_to_noisy = same_document & (block[:, None] == block[None, :])
    noisy_to_clean = same_document & (block[:, None] > block[None, :])
    clean_to_clean = same_document & (block[:, None] >= block[None, :])
    top = torch.cat([noisy_to_noisy, noisy_to_clean], dim=1)
    bottom = torch.cat([torch.zeros_like(same_document), clean_to_clean], dim=1)
    return torch.cat([top, bottom])


def positions(document_lengths: Sequence[int]) -> Tensor:
    """int64 [L]: positions that restart in each document."""
    return torch.cat([torch.arange(n) for n in document_lengths])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x_BSND: Tensor, position_BS: Tensor, config: ModelConfig) -> Tensor:
    """Half-split rotary embedding on the first ``rotary_percent`` of the channels."""
    d = int(config.head_dim * config.rotary_percent)
    frequency = config.rope_theta ** -(torch.arange(0, d, 2, dtype=x_BSND.dtype) / d)
    angle = (position_BS[..., None].to(x_BSND.dtype) * frequency)[:, :, None, :]
    first, second, rest = x_BSND[..., : d // 2], x_BSND[..., d // 2 : d], x_BSND[..., d:]
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin(), rest], dim=-1
    )


def attention(x_BSH: Tensor, w: Weights, prefix: str, position_BS: Tensor, mask: Tensor, config: ModelConfig) -> Tensor:
    n, g, d = config.num_attention_heads, config.num_query_groups, config.head_dim
    if config.architecture == "llada2_moe":
        q, k, v = F.linear(x_BSH, w[f"{prefix}.attention.query_key_value.weight"]).split([n * d, g * d, g * d], dim=-1)
        norms, out = ("attention.query_layernorm", "attention.key_layernorm"), "attention.dense"
    else:
        q, k, v = (
            F.linear(x_BSH, w[f"{prefix}.self_attn.{c}_proj.weight"], w.get(f"{prefix}.self_attn.{c}_proj.bias"))
            for c in "qkv"
        )
        norms, out = ("self_attn.q_norm", "self_attn.k_norm"), "self_attn.o_proj"
    q, k, v = q.unflatten(-1, (n, d)), k.unflatten(-1, (g, d)), v.unflatten(-1, (g, d))
    if config.qk_norm:
        q = rms_norm(q, w[f"{prefix}.{norms[0]}.weight"], config.norm_eps)
        k = rms_norm(k, w[f"{prefix}.{norms[1]}.weight"], config.norm_eps)
    q, k = rotate(q, position_BS, config), rotate(k, position_BS, config)
    k, v = k.repeat_interleave(n // g, dim=2), v.repeat_interleave(n // g, dim=2)
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / d**0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    seen = mask.any(-1)[:, None]  # a row that sees nothing has output 0
    probabilities = torch.softmax(scores.masked_fill(~seen, 0.0), dim=-1) * seen
    output = torch.einsum("bnqk,bknd->bqnd", probabilities, v).flatten(2)
    return F.linear(output, w[f"{prefix}.{out}.weight"])


def swiglu(x: Tensor, w: Weights, prefix: str) -> Tensor:
    gate, up = F.linear(x, w[f"{prefix}.gate_proj.weight"]), F.linear(x, w[f"{prefix}.up_proj.weight"])
    return F.linear(F.silu(gate) * up, w[f"{prefix}.down_proj.weight"])


def route(x_TH: Tensor, w: Weights, prefix: str, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Chosen experts int64 [T, K] and their weights [T, K]: the published Ling 2.0 rule, token by token."""
    moe = config.moe
    logit_TE = F.linear(x_TH, w[f"{prefix}.gate.weight"])
    score_TE = torch.sigmoid(logit_TE.float()).to(logit_TE.dtype)  # the score is fp32 by definition, in fp64 models too
    biased_TE = score_TE + w[f"{prefix}.gate.expert_bias"]
    size = moe.num_experts // moe.num_groups
    chosen = []
    for biased_E in biased_TE.detach():
        groups = [biased_E[i * size : (i + 1) * size].sort(descending=True).values for i in range(moe.num_groups)]
        ranked = sorted(range(moe.num_groups), key=lambda i: -float(groups[i][:2].sum()))[: moe.group_top_k]
        experts = [e for i in ranked for e in range(i * size, (i + 1) * size)]
        chosen.append(sorted(experts, key=lambda e: -float(biased_E[e]))[: moe.top_k])
    index_TK = torch.tensor(chosen)
    weight_TK = score_TE.gather(1, index_TK)
    return index_TK, weight_TK / weight_TK.sum(-1, keepdim=True) * moe.routed_scaling_factor


def mixture(x_BSH: Tensor, w: Weights, prefix: str, config: ModelConfig) -> Tensor:
    x_TH = x_BSH.flatten(0, 1)
    index_TK, weight_TK = route(x_TH, w, prefix, config)
    rows = []
    for token, experts, weights in zip(x_TH, index_TK.tolist(), weight_TK, strict=True):
        outputs = [swiglu(token, w, f"{prefix}.experts.{e}") for e in experts]
        rows.append(sum(weight * output for weight, output in zip(weights, outputs, strict=True)))
    routed = torch.stack(rows).view_as(x_BSH)
    return routed + swiglu(x_BSH, w, f"{prefix}.shared_experts") if config.moe.shared_expert_ffn_hidden_size else routed


def logits(ids_BS: Tensor, position_BS: Tensor, mask: Tensor, w: Weights, config: ModelConfig) -> Tensor:
    """[B, S, V]; ``mask`` bool [S, S] for every batch row."""
    is_ling = config.architecture == "llada2_moe"
    table = w["model.word_embeddings.weight" if is_ling else "model.embed_tokens.weight"]
    x = table[ids_BS]
    return head(layers(x, position_BS, mask, w, config), w, config, table)


def layers(x_BSH: Tensor, position_BS: Tensor, mask: Tensor, w: Weights, config: ModelConfig) -> Tensor:
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        normed = rms_norm(x_BSH, w[f"{prefix}.input_layernorm.weight"], config.norm_eps)
        x_BSH = x_BSH + attention(normed, w, prefix, position_BS, mask[None], config)
        normed = rms_norm(x_BSH, w[f"{prefix}.post_attention_layernorm.weight"], config.norm_eps)
        is_moe = config.is_moe_layer(layer)
        x_BSH = x_BSH + (mixture(normed, w, f"{prefix}.mlp", config) if is_moe else swiglu(normed, w, f"{prefix}.mlp"))
    return x_BSH


def head(x_BSH: Tensor, w: Weights, config: ModelConfig, table: Tensor) -> Tensor:
    output = table if config.tie_embeddings else w["lm_head.weight"]
    return F.linear(rms_norm(x_BSH, w["model.norm.weight"], config.norm_eps), output)
