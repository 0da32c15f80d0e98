"""ModelConfig and ParallelConfig -> Megatron-Core's TransformerConfig."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from llada_mega.config.checks import divides
from llada_mega.config.fp8 import RECIPES
from llada_mega.config.layout import DEEP_EP_DISPATCHERS, check_layout
from llada_mega.config.model import ModelConfig
from llada_mega.config.moe import check_routing
from llada_mega.config.run import ParallelConfig
from llada_mega.errors import ConfigError
from llada_mega.parallel.capabilities import choose_attention, choose_gradient_fusion, choose_implementation
from llada_mega.parallel.gpu_features import check_gpu_features
from llada_mega.parallel.megatron_compat import transformer_config

VOCAB_MULTIPLE = 128


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """``vocab_size`` rounded up to a multiple of 128 x tp: rows of the embedding and output matrices."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def check_model(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype = torch.float32, fp8: str | None = None
) -> None:
    """Refuse shapes that cannot be built or split, and what this machine does not have.

    Raises:
        ConfigError: naming the keys, the values and a fix.
    """
    choose_implementation(model.implementation, dtype)
    choose_attention(model, dtype)
    divides("model.num_query_groups", model.num_query_groups, "model.num_attention_heads", model.num_attention_heads)
    channels = model.head_dim * model.rotary_percent
    if abs(channels / 2 - round(channels / 2)) > 1e-6 or not 0.0 < model.rotary_percent <= 1.0:
        raise ConfigError(
            f"model.rotary_percent={model.rotary_percent} of model.head_dim={model.head_dim} must be an even, positive "
            f"number of channels; use 1.0 or 0.5"
        )
    if model.is_moe:
        _check_moe(model)
    check_layout(model, parallel)
    check_gpu_features(model, parallel, dtype, fp8)


def build_transformer_config(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, fp8: str | None = None
) -> TransformerConfig:
    """The ``TransformerConfig`` of ``model`` under ``parallel`` with parameters and activations in ``dtype``.

    ``fp8`` is a recipe of :data:`llada_mega.config.fp8.RECIPES` for the matrix products of the layers, or None.

    Parameters are initialised by :mod:`llada_mega.models.initialization`, the expert bias is updated by
    :func:`llada_mega.models.router.update_expert_bias`: Megatron's own mechanisms for both are off. Weight gradients
    are fused only when ``parallel.gradient_accumulation_fusion`` is true: it needs the buffers of data parallelism.

    Raises:
        ConfigError: the shape cannot be built or split, or this machine cannot do what is asked for.
    """
    check_model(model, parallel, dtype, fp8)
    implementation = choose_implementation(model.implementation, dtype).name
    fused_gradients = choose_gradient_fusion(parallel.gradient_accumulation_fusion or False, implementation).name
    fields: dict[str, object] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.ffn_hidden_size,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "use_te_activation_func": implementation == "local",  # the activation is a module: ours, not TE's
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_eps,
        "qk_layernorm": model.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # 0.16 marks a parameter as tensor-parallel only while it initialises it: let it initialise with nothing
        "perform_initialization": True,
        "init_method": _leave_uninitialized,
        "output_layer_init_method": _leave_uninitialized,
        "embedding_init_method": _leave_uninitialized,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "transformer_impl": "transformer_engine" if implementation == "te" else "local",
        "bias_activation_fusion": implementation == "te",  # keeps its input alone, as ours does
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": implementation == "te",  # takes angles [S, 1, 1, d], so one sequence a call
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": fused_gradients == "on",
        "calculate_per_token_loss": True,
        "hetereogenous_dist_checkpoint": True,  # (sic) one checkpoint key a layer
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vp,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
        "context_parallel_size": parallel.cp,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp,
        "sequence_parallel": parallel.sp,
        "variable_seq_lengths": parallel.pp > 1,
    }
    fields |= _activation_fields(parallel) | _pipeline_fields(parallel) | _fp8_fields(fp8)
    fields |= _dispatcher_fields(parallel.dispatcher if model.is_moe else "alltoall")
    if model.is_moe:
        fields |= _moe_fields(model, dtype, implementation)
    return transformer_config(**fields)


def _leave_uninitialized(weight: torch.Tensor) -> None:
    """In place of Megatron's init methods: see :mod:`llada_mega.models.initialization`."""


def _activation_fields(parallel: ParallelConfig) -> dict[str, object]:
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if parallel.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}
    if parallel.offload_layers:
        return {"cpu_offloading": True, "cpu_offloading_num_layers": parallel.offload_layers}
    return {}


def _fp8_fields(fp8: str | None) -> dict[str, object]:
    """Weights stay in bf16 (``fp8_param`` is off): checkpoints and the optimizer know nothing of FP8."""
    if fp8 is None:
        return {}
    fields: dict[str, object] = {"fp8": RECIPES[fp8].format, "fp8_recipe": fp8}
    if fp8 == "delayed":
        fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}  # TransformerEngine's own defaults
    return fields


def _dispatcher_fields(dispatcher: str) -> dict[str, object]:
    if dispatcher in DEEP_EP_DISPATCHERS:
        return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": dispatcher}
    return {"moe_token_dispatcher_type": dispatcher}


def _pipeline_fields(parallel: ParallelConfig) -> dict[str, object]:
    if parallel.vp is None:
        return {}
    # On gloo an interleaved schedule is exact only like this: batched sends, and freeing outputs early under
    # overlapped sends, give wrong gradients.
    return {"batch_p2p_comm": False, "overlap_p2p_comm": True, "deallocate_pipeline_outputs": torch.cuda.is_available()}


def _moe_fields(model: ModelConfig, dtype: torch.dtype, implementation: str) -> dict[str, object]:
    moe = model.moe
    return {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(model.is_moe_layer(layer)) for layer in range(model.num_layers)],
        "moe_ffn_hidden_size": moe.expert_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_expert_ffn_hidden_size or None,
        "moe_router_topk": moe.top_k,
        "moe_router_num_groups": moe.num_groups if moe.num_groups > 1 else None,
        "moe_router_group_topk": moe.group_top_k if moe.num_groups > 1 else None,
        "moe_router_score_function": moe.score_function,
        "moe_router_pre_softmax": False,
        "moe_router_topk_scaling_factor": moe.routed_scaling_factor,
        "moe_router_enable_expert_bias": False,
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp64" if dtype == torch.float64 else "fp32",
        "moe_grouped_gemm": implementation == "te",
        # TransformerEngine's kernels; without them the dispatchers wait for the GPU to find the routes
        "moe_permute_fusion": implementation == "te",
    }


def _check_moe(model: ModelConfig) -> None:
    moe = model.moe
    check_routing(model)
    divides("model.moe.num_groups", moe.num_groups, "model.moe.num_experts", moe.num_experts)
    if moe.num_groups > 1 and moe.top_k != 2 * moe.group_top_k:
        raise ConfigError(
            f"model.moe.top_k={moe.top_k} must be 2 x model.moe.group_top_k={moe.group_top_k}: groups are ranked by "
            f"their two best experts, which Megatron-Core computes only then; use top_k={2 * moe.group_top_k}"
        )
    if moe.num_groups > 1 and moe.group_top_k > moe.num_groups:
        raise ConfigError(
            f"model.moe.group_top_k={moe.group_top_k} exceeds model.moe.num_groups={moe.num_groups}; lower it"
        )
    available = moe.num_experts // moe.num_groups * (moe.group_top_k if moe.num_groups > 1 else 1)
    if moe.top_k > available:
        raise ConfigError(f"model.moe.top_k={moe.top_k} exceeds the {available} experts it chooses from; lower it")
