"""What models of TransformerEngine's modules get of the keys for GPUs: part of ``make te-check``.

Models are built as in :mod:`tests.te.check`, on a GPU that does not exist, and asked what they would do.
"""

from __future__ import annotations

from tests.te import fake_cuda

fake_cuda.install()  # before anything asks for CUDA

import contextlib  # noqa: E402
import dataclasses  # noqa: E402

import megatron.core  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from megatron.core.fp8_utils import get_fp8_recipe  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402

from llada_mega.config.model import ModelConfig  # noqa: E402
from llada_mega.config.run import ParallelConfig  # noqa: E402
from llada_mega.errors import ConfigError  # noqa: E402
from llada_mega.models import BlockDiffusionModel, build_model  # noqa: E402
from llada_mega.parallel import destroy, initialize  # noqa: E402
from tests.models.helpers import moe_config  # noqa: E402

RECIPES = {  # trainer.fp8 -> compute capability, class and format of TransformerEngine's recipe
    "delayed": ((9, 0), "DelayedScaling", "HYBRID"),
    "tensorwise": ((9, 0), "Float8CurrentScaling", "HYBRID"),
    "blockwise": ((9, 0), "Float8BlockScaling", "E4M3"),
    "mxfp8": ((10, 0), "MXFP8BlockScaling", "E4M3"),
}


def small_model() -> ModelConfig:
    """A mixture of experts whose sizes FP8 allows."""
    sizes = {"hidden_size": 128, "head_dim": 32, "ffn_hidden_size": 192}
    config = dataclasses.replace(moe_config(), implementation="te", attention_backend="reference", **sizes)
    config.moe = dataclasses.replace(config.moe, expert_ffn_hidden_size=64, shared_expert_ffn_hidden_size=64)
    return config


def build(parallel: ParallelConfig | None = None, fp8: str | None = None) -> BlockDiffusionModel:
    """The small model on the meta device."""
    with torch.device("meta"):
        return build_model(small_model(), parallel=parallel, dtype=torch.bfloat16, fp8=fp8, seed=None)


def check_fp8() -> None:
    """Every recipe becomes TransformerEngine's on GPUs that have it; the others refuse it."""
    for name, (capability, recipe, layout) in RECIPES.items():
        torch.cuda.get_device_capability = lambda device=None, capability=capability: capability
        model = build(fp8=name)
        made = get_fp8_recipe(model.decoder.config)
        assert recipe in {kind.__name__ for kind in type(made).__mro__} and made.fp8_format.name == layout, made
        assert not model.decoder.config.fp8_param  # weights stay in bf16
        if name == "delayed":
            assert (made.amax_history_len, made.amax_compute_algo) == (1024, "max")
        print(f"trainer.fp8={name}: {recipe}, {layout}")
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    try:
        build(fp8="mxfp8")
    except ConfigError as error:
        assert "use delayed, tensorwise, blockwise, null" in str(error), error
    else:
        raise AssertionError("mxfp8 on a GPU that does not have it")
    assert build().decoder.config.fp8 is None


def check_activations() -> None:
    """Modules that are recomputed, and layers whose activations leave the GPU."""
    modules = ["core_attn", "layernorm", "moe_act"]
    decoder = build(ParallelConfig(recompute="selective", recompute_modules=modules)).decoder
    moe_layers = [layer for layer in decoder.layers if isinstance(layer.mlp, MoELayer)]
    assert moe_layers and decoder.checkpoint_core_attention
    assert all(layer.recompute_pre_mlp_layernorm and layer.mlp.experts.activation_recompute for layer in moe_layers)
    assert not any(layer.recompute_mlp for layer in decoder.layers)
    plain = build().decoder
    assert not any(layer.recompute_pre_mlp_layernorm for layer in plain.layers) and not plain.checkpoint_core_attention
    assert isinstance(plain.offload_context, contextlib.nullcontext), plain.offload_context
    offloading = build(ParallelConfig(offload_layers=2)).decoder
    assert not isinstance(offloading.offload_context, contextlib.nullcontext)
    assert offloading.config._cpu_offloading_context is offloading.offload_context
    assert offloading.config.cpu_offloading_num_layers == 2
    print("recomputed modules, offloaded layers: ok")


def check_experts() -> None:
    """Grouped products, and TransformerEngine's kernels for the permutation."""
    layers = [layer.mlp for layer in build().decoder.layers if isinstance(layer.mlp, MoELayer)]
    assert {type(layer.experts).__name__ for layer in layers} == {"TEGroupedMLP"}
    assert all(layer.token_dispatcher.config.moe_permute_fusion for layer in layers)
    for activated in (*(layer.experts for layer in layers), *(layer.shared_experts for layer in layers)):
        assert activated.config.bias_activation_fusion and activated.activation_func is F.silu
    print("experts: TEGroupedMLP, fused permutation, fused SwiGLU")


def main() -> int:
    """Run all checks; an AssertionError says which one failed."""
    print(f"Megatron-Core {megatron.core.__version__}")
    with fake_cuda.world(0, 1):
        initialize(ParallelConfig())
        try:
            check_fp8()
            check_activations()
            check_experts()
        finally:
            destroy()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
