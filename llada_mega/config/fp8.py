"""Which FP8 recipes there are, what their matrix products ask of sizes, and which GPUs have them. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from llada_mega.config.checks import one_of, require
from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig


@dataclass(frozen=True)
class Fp8Recipe:
    """A way of scaling tensors into FP8, under Megatron-Core's name.

    Attributes:
        format: of TransformerEngine: e4m3 everywhere, or hybrid, with e5m2 for gradients. Scales for a whole tensor
            leave gradients too little range in e4m3; scales for blocks do not.
        multiple: of every dimension of a matrix product.
        lowest, below: compute capabilities of the GPUs that TransformerEngine has it for.
    """

    format: str
    multiple: int
    lowest: tuple[int, int]
    below: tuple[int, int] = (99, 0)


RECIPES = {
    "delayed": Fp8Recipe("hybrid", 16, (8, 9)),  # scales from the largest values of earlier steps
    "tensorwise": Fp8Recipe("hybrid", 16, (8, 9)),  # scales from the tensor itself
    "blockwise": Fp8Recipe("e4m3", 16, (9, 0)),  # 1 x 128 of activations, 128 x 128 of weights
    "mxfp8": Fp8Recipe("e4m3", 32, (10, 0), below=(12, 0)),  # 1 x 32, by the hardware
}


def check_fp8(name: str | None, dtype: str, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises ConfigError unless recipe ``name`` (None: no FP8) goes with these sizes under this layout.

    The number of positions needs no check: each rank's are a multiple of 128 (``data.context.length_multiple``), and
    TransformerEngine pads the tokens of each expert.
    """
    if name is None:
        return
    one_of("trainer.fp8", name, tuple(RECIPES))
    require(
        dtype == "bfloat16",
        f"trainer.fp8={name} keeps weights and activations in bfloat16 between its products, but trainer.dtype={dtype};"
        " set trainer.dtype=bfloat16",
    )
    require(model.implementation != "local", f"trainer.fp8={name} needs TransformerEngine; set model.implementation=te")
    sizes = {
        "model.hidden_size": (model.hidden_size, 1),
        "model.ffn_hidden_size": (model.ffn_hidden_size, parallel.tp),
        "model.num_attention_heads x head_dim": (model.num_attention_heads * model.head_dim, parallel.tp),
        "model.num_query_groups x head_dim": (model.num_query_groups * model.head_dim, parallel.tp),
    }
    if model.is_moe:
        moe = model.moe
        sizes["model.moe.expert_ffn_hidden_size"] = (moe.expert_ffn_hidden_size, parallel.etp)
        sizes["model.moe.shared_expert_ffn_hidden_size"] = (moe.shared_expert_ffn_hidden_size, parallel.tp)
    multiple = RECIPES[name].multiple
    for key, (size, ranks) in sizes.items():
        part = f"{size} / {ranks} ranks" if ranks > 1 else f"{size}"
        require(
            size // ranks % multiple == 0,
            f"trainer.fp8={name} needs matrices whose sides are multiples of {multiple}, but {key}={part} is none; "
            "set trainer.fp8=null",
        )
    remade = sorted({"moe_act", "layernorm"} & set(parallel.recompute_modules))
    require(
        name != "delayed" or parallel.recompute != "selective" or not remade,
        f"trainer.fp8=delayed does not go with parallel.recompute_modules={parallel.recompute_modules}: {remade} would "
        "be scaled twice; leave them out or use trainer.fp8=tensorwise",
    )
