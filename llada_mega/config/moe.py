"""Routing rules that fit together: score function, groups, shared expert and scaling of a mixture of experts."""

from __future__ import annotations

from llada_mega.config.checks import one_of, require
from llada_mega.config.model import ModelConfig

SCORE_FUNCTIONS = {"llada2_moe": "sigmoid", "qwen3_moe": "softmax"}  # of the MoE families


def check_routing(model: ModelConfig) -> None:
    """Refuse a score function that is unknown, not the family's, or combined with what it cannot be combined with.

    Raises:
        ConfigError: naming the keys, the values and a fix.
    """
    moe = model.moe
    one_of("model.moe.score_function", moe.score_function, ("sigmoid", "softmax"))
    wanted = SCORE_FUNCTIONS.get(model.architecture, moe.score_function)
    require(
        moe.score_function == wanted,
        f"model.moe.score_function={moe.score_function} does not fit model.architecture={model.architecture}; "
        f"use {wanted}",
    )
    if moe.score_function == "sigmoid":
        return
    unsupported = {
        "num_groups": (moe.num_groups, 1),
        "shared_expert_ffn_hidden_size": (moe.shared_expert_ffn_hidden_size, 0),
        "routed_scaling_factor": (moe.routed_scaling_factor, 1.0),
    }
    for key, (value, only) in unsupported.items():
        require(
            value == only,
            f"model.moe.{key}={value} does not go with model.moe.score_function=softmax; use {only}",
        )
    # Renormalised over the chosen experts, the weight of a single one is 1 whatever its logit: nothing to learn from.
    require(
        moe.top_k > 1,
        f"model.moe.top_k={moe.top_k} leaves a softmax router without a gradient; use 2 or more",
    )
