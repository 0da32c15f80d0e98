"""Layer specs: Megatron's or TransformerEngine's modules, our attention and router, one set of checkpoint keys."""

from __future__ import annotations

import functools

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from llada_mega.config.model import ModelConfig
from llada_mega.models.attention import IntervalCoreAttention
from llada_mega.models.grouped_experts import can_group
from llada_mega.models.last_layer import LastLayer
from llada_mega.models.layer_modules import LayerModules, local_modules, te_modules
from llada_mega.models.router import BalancedRouter
from llada_mega.parallel import megatron_compat

# TransformerEngine fuses a norm into the linear layer behind it, and names its weight accordingly. Checkpoints use
# those names whatever the implementation. A MoE layer's second norm feeds the router too, so TE leaves it alone.
ATTENTION_NORM = ("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
DENSE_NORM = ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def layer_spec(model: ModelConfig, layer_index: int, modules: LayerModules) -> ModuleSpec:
    """Spec of the transformer layer with the 0-based global ``layer_index``."""
    is_moe = model.is_moe_layer(layer_index)
    is_fused = modules.norm_column is not None
    qk_norm = modules.norm if model.qk_norm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=modules.norm_column if is_fused else modules.column,
        core_attention=functools.partial(IntervalCoreAttention, backend=model.attention_backend),
        linear_proj=modules.row,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    if is_moe:
        linears, shared_linears = (modules.expert_column, modules.expert_row), (modules.column, modules.row)
        mlp = megatron_compat.moe_mlp(BalancedRouter, modules.experts, linears, shared_linears, modules.activation)
    else:
        mlp = megatron_compat.dense_mlp(
            modules.norm_column if is_fused else modules.column, modules.row, modules.activation
        )
    separate_norms = [] if is_fused else [ATTENTION_NORM] if is_moe else [ATTENTION_NORM, DENSE_NORM]
    return ModuleSpec(
        module=LastLayer if layer_index == model.num_layers - 1 else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if is_fused else modules.norm,
            self_attention=ModuleSpec(
                module=modules.self_attention, params={"attn_mask_type": AttnMaskType.arbitrary}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if is_fused and not is_moe else modules.norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(separate_norms),
        ),
    )


def layer_offset(config: TransformerConfig, pp_rank: int, vp_stage: int | None = None) -> int:
    """Number of layers before the first layer of this pipeline stage (of this model chunk)."""
    return get_transformer_layer_offset(config, vp_stage, pp_rank)


def block_spec(
    model: ModelConfig, config: TransformerConfig, pp_rank: int, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Specs of the layers on this pipeline stage (of this model chunk) and of the final norm."""
    if config.transformer_impl == "transformer_engine":
        modules = te_modules()
    else:
        modules = local_modules(config.gradient_accumulation_fusion, model.is_moe and can_group(config))
    first = layer_offset(config, pp_rank, vp_stage)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    layers = [layer_spec(model, layer, modules) for layer in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=modules.norm)
