"""``config.json`` of the mixtures of experts: Ling 2.0 and LLaDA2 (one shape under three names), and Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from llada_mega.checkpoint.hf_fields import Fields, common_shape
from llada_mega.config.model import ModelConfig, MoEConfig

STACKED_EXPERTS = (
    "llada2_moe_veomni"  # LLaDA2 with the experts of a layer in one tensor, as fine-tuning code keeps them
)
LLADA2_CLASSES = {
    "llada2_moe": "LLaDA2MoeModelLM",
    STACKED_EXPERTS: "LLaDA2MoeModelLM",
    "bailing_moe_v2": "BailingMoeV2ForCausalLM",
}

# What the published code can be told to compute and no published checkpoint does. Written in full, because the class
# defaults say otherwise (biases, dropout); read as: absent, or this.
LLADA2_CONSTANTS: dict[str, Any] = {
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "use_rmsnorm": True,
    "norm_head": False,
    "norm_softmax": False,
    "using_split_qkv_in_self_attention": False,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "score_function": "sigmoid",
    "norm_topk_prob": True,
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
}


def parse_llada2(fields: Fields) -> ModelConfig:
    """Shape of a Ling 2.0 or LLaDA2 model. ``num_nextn_predict_layers`` of Ling may be there: they are not the model.

    Raises:
        CheckpointError: a field is missing, contradicts another one, or asks for something that is not supported.
    """
    for name, only in LLADA2_CONSTANTS.items():
        fields.refuse(name, only)
    head_dim = fields.count("head_dim")
    common = common_shape(fields)
    return ModelConfig(
        architecture="llada2_moe",
        head_dim=head_dim,
        rotary_percent=_rotary_percent(fields, head_dim),
        qk_norm=True,
        moe=_llada2_experts(fields, common["num_layers"]),
        **common,
    )


def _rotary_percent(fields: Fields, head_dim: int) -> float:
    """Share of the channels that rotate, from any of the three fields that may state it."""
    rotary_dim = fields.get("rotary_dim", int, None)
    name = "partial_rotary_factor"
    share = fields.agree(
        {
            name: fields.get(name, float, None),
            f"rope_parameters.{name}": fields.nested("rope_parameters").get(name, float, None),
            f"rotary_dim / head_dim={rotary_dim} / {head_dim}": None if rotary_dim is None else rotary_dim / head_dim,
        }
    )
    if not 0 < share <= 1 or head_dim * share % 2:
        raise fields.fail(f"{name}={share} of head_dim={head_dim} is no even number of channels")
    return share


def _llada2_experts(fields: Fields, num_layers: int) -> MoEConfig:
    experts, top_k = fields.count("num_experts"), fields.count("num_experts_per_tok")
    groups, group_top_k = fields.count("n_group"), fields.count("topk_group")
    dense = fields.count("first_k_dense_replace", minimum=0)
    if experts % groups:
        raise fields.fail(f"n_group={groups} does not divide num_experts={experts}")
    if group_top_k > groups:
        raise fields.fail(f"topk_group={group_top_k} exceeds n_group={groups}")
    if top_k > group_top_k * (experts // groups):
        raise fields.fail(f"num_experts_per_tok={top_k} exceeds the experts of topk_group={group_top_k} groups")
    if groups > 1 and top_k != 2 * group_top_k:  # Megatron-Core ranks a group by its top_k // group_top_k best experts
        raise fields.fail(
            f"num_experts_per_tok={top_k} is not 2 x topk_group={group_top_k}, which is not supported: groups are "
            "ranked by their two best experts"
        )
    if dense >= num_layers:
        raise fields.fail(
            f"first_k_dense_replace={dense} leaves no layer of num_hidden_layers={num_layers} for experts"
        )
    width, shared = fields.count("moe_intermediate_size"), fields.count("num_shared_experts", minimum=0)
    scale = fields.get("routed_scaling_factor", float)
    if scale <= 0:
        raise fields.fail(f"routed_scaling_factor={scale} must be positive")
    name = "moe_shared_expert_intermediate_size"
    return MoEConfig(
        num_experts=experts,
        top_k=top_k,
        num_groups=groups,
        group_top_k=group_top_k,
        expert_ffn_hidden_size=width,
        shared_expert_ffn_hidden_size=fields.agree(
            {name: fields.get(name, int, None), "moe_intermediate_size x num_shared_experts": width * shared}
        ),
        first_dense_layers=dense,
        score_function="sigmoid",
        routed_scaling_factor=scale,
    )


def llada2_content(config: ModelConfig, stacked_experts: bool) -> dict[str, Any]:
    """The fields of a LLaDA2 ``config.json`` beyond those that every family has."""
    moe = config.moe
    return {
        "model_type": STACKED_EXPERTS if stacked_experts else "llada2_moe",
        "auto_map": {
            "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
            "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
            "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
        },
        **LLADA2_CONSTANTS,
        "rope_scaling": None,
        "partial_rotary_factor": config.rotary_percent,
        "rotary_dim": round(config.head_dim * config.rotary_percent),
        "use_sliding_window": False,
        "max_window_layers": config.num_layers,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "n_group": moe.num_groups,
        "topk_group": moe.group_top_k,
        "moe_intermediate_size": moe.expert_ffn_hidden_size,
        "num_shared_experts": moe.shared_expert_ffn_hidden_size // moe.expert_ffn_hidden_size,
        "first_k_dense_replace": moe.first_dense_layers,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "output_router_logits": False,
        "pad_token_id": None,  # unless the model has one: the class default is the published vocabulary's
    }


def qwen3_experts(fields: Fields, num_layers: int) -> MoEConfig:
    """Experts of a Qwen3-MoE model; transformers 5 writes their number as ``num_local_experts``.

    Raises:
        CheckpointError: a field is missing, contradicts another one, or asks for something that is not supported.
    """
    for name, kind, only in (("norm_topk_prob", bool, True), ("decoder_sparse_step", int, 1)):
        fields.get(name, kind)
        fields.refuse(name, only)
    dense = fields.get("mlp_only_layers", list)
    if dense != list(range(len(dense))):
        raise fields.fail(f"mlp_only_layers={dense} is not supported; only the first layers may be dense, as in [0, 1]")
    if len(dense) >= num_layers:
        raise fields.fail(f"mlp_only_layers={dense} leaves no layer of num_hidden_layers={num_layers} for experts")
    experts = fields.agree({name: fields.get(name, int, None) for name in ("num_experts", "num_local_experts")})
    top_k = fields.count("num_experts_per_tok")
    if top_k > experts:
        raise fields.fail(f"num_experts_per_tok={top_k} exceeds num_experts={experts}")
    return MoEConfig(
        num_experts=experts,
        top_k=top_k,
        num_groups=1,
        group_top_k=1,
        expert_ffn_hidden_size=fields.count("moe_intermediate_size"),
        shared_expert_ffn_hidden_size=0,
        first_dense_layers=len(dense),
        score_function="softmax",
        routed_scaling_factor=1.0,
    )


def qwen3_experts_content(moe: MoEConfig) -> dict[str, Any]:
    """The fields of a Qwen3-MoE ``config.json`` that Qwen3's has not."""
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_ffn_hidden_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(moe.first_dense_layers)),
        "output_router_logits": False,
    }
