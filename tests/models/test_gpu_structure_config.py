"""Keys for GPUs: what they refuse, and what Megatron-Core's modules get of them.

With TransformerEngine's modules the same is looked at by ``make te-check`` (:mod:`tests.te.features`).
"""

from __future__ import annotations

import collections
import re
import sys
from types import ModuleType

import pytest
import torch

from llada_mega.config.compose import compose
from llada_mega.config.fp8 import RECIPES, check_fp8
from llada_mega.config.layout import check_layout
from llada_mega.config.run import ParallelConfig
from llada_mega.config.schema import Config
from llada_mega.config.training import OptimizerConfig
from llada_mega.config.validate import validate
from llada_mega.data.context import length_multiple, logit_row_multiple
from llada_mega.errors import ConfigError
from llada_mega.models import build_model, mask_carrier
from llada_mega.models.config import build_transformer_config
from llada_mega.parallel import capabilities, gpu_features
from llada_mega.parallel.capabilities import DEEP_EP, Choice
from llada_mega.parallel.gpu_features import check_gpu_features
from llada_mega.training.optimizer import build_optimizer, wrap_data_parallel
from tests.models.helpers import bdlm_inputs, dense_config, moe_config

MINI = ["experiment=cpt_16b", "data.train=[{path: corpus}]", "trainer.dtype=bfloat16"]
SELECTIVE = "parallel.recompute=selective"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.fp8=e4m3"], "trainer.fp8=e4m3 is not a choice; use delayed, tensorwise, blockwise or mxfp8"),
        (["trainer.fp8=blockwise", "trainer.dtype=float32"], "but trainer.dtype=float32; set trainer.dtype=bfloat16"),
        (
            ["trainer.fp8=blockwise", "model.implementation=local"],
            "trainer.fp8=blockwise needs TransformerEngine; set model.implementation=te",
        ),
        (
            ["trainer.fp8=mxfp8", "model.moe.expert_ffn_hidden_size=528"],
            "sides are multiples of 32, but model.moe.expert_ffn_hidden_size=528 is none; set trainer.fp8=null",
        ),
        (
            ["trainer.fp8=delayed", SELECTIVE, "parallel.recompute_modules=[layernorm]"],
            "trainer.fp8=delayed does not go with parallel.recompute_modules=['layernorm']",
        ),
        (
            [SELECTIVE, "parallel.recompute_modules=[experts]"],
            "experts is no part of this model that can be recomputed; use core_attn, layernorm, mlp, moe, moe_act or",
        ),
        ([SELECTIVE], "parallel.recompute=selective needs parallel.recompute_modules; name modules, as in [shared_exp"),
        (
            ["model=tiny", "parallel=single", SELECTIVE],
            "name modules, as in [mlp] or with TransformerEngine [layernorm]",
        ),
        (
            ["parallel.recompute=full", "parallel.recompute_modules=[moe]"],
            "parallel.recompute_modules=['moe'] has no effect with parallel.recompute=full; set",
        ),
        (["parallel.offload_layers=20"], "parallel.offload_layers=20 is out of range; use 0 to 19"),
        (
            ["parallel.offload_layers=4", SELECTIVE, "parallel.recompute_modules=[mlp]"],
            "parallel.offload_layers=4 does not go with parallel.recompute=selective; set parallel.recompute=none",
        ),
        (
            ["parallel.offload_layers=4", "parallel.recompute=none", "parallel.pp=2"],
            "parallel.offload_layers=4 does not go with parallel.pp=2",
        ),
        (
            ["parallel.ep=1", "parallel.dispatcher=deepep"],
            "parallel.dispatcher=deepep sends tokens between the ranks of experts, and parallel.ep=1 has none; use",
        ),
    ],
)
def test_contradictions_are_refused_when_composed(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        validate(compose(Config, [*MINI, *overrides]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_published_models_can_be_trained_in_fp8(recipe: str) -> None:
    for experiment in ("cpt_16b", "cpt_100b"):
        overrides = [f"experiment={experiment}", "data.train=[{path: corpus}]", f"trainer.fp8={recipe}"]
        validate(compose(Config, overrides))


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(tp=4, sp=True, cp=2)])
def test_lengths_on_gpus_are_multiples_that_every_recipe_takes(parallel: ParallelConfig) -> None:
    ranks = parallel.cp * parallel.tp if parallel.sp else parallel.cp
    for recipe in RECIPES.values():
        assert length_multiple(parallel) % (recipe.multiple * ranks) == 0
        assert logit_row_multiple(parallel) % (recipe.multiple * (parallel.tp if parallel.sp else 1)) == 0


def test_fp8_counts_what_a_tensor_parallel_rank_has() -> None:
    model = moe_config(hidden_size=128, head_dim=32, ffn_hidden_size=96)
    model.moe.expert_ffn_hidden_size = model.moe.shared_expert_ffn_hidden_size = 64
    check_fp8("blockwise", "bfloat16", model, ParallelConfig(tp=2, sp=True))
    with pytest.raises(ConfigError, match=re.escape("model.ffn_hidden_size=96 / 4 ranks is none")):
        check_fp8("blockwise", "bfloat16", model, ParallelConfig(tp=4, sp=True))


@pytest.mark.parametrize(
    ("parallel", "fp8", "message"),
    [
        (ParallelConfig(), "blockwise", "trainer.fp8=blockwise needs TransformerEngine, and .*; set trainer.fp8=null"),
        (ParallelConfig(offload_layers=1), None, "parallel.offload_layers=1 needs TransformerEngine, and .*; set"),
        (
            ParallelConfig(recompute="selective", recompute_modules=["layernorm"]),
            None,
            "parallel.recompute_modules: layernorm needs TransformerEngine, and .*; leave it out",
        ),
        (
            ParallelConfig(recompute="selective", recompute_modules=["core_attn", "moe_act"]),
            None,
            "parallel.recompute_modules: moe_act needs TransformerEngine, and .*; leave it out",
        ),
        (
            ParallelConfig(ep=2, dispatcher="deepep"),
            None,
            "parallel.dispatcher=deepep needs the library deep_ep, and .*; use parallel.dispatcher=alltoall",
        ),
        (ParallelConfig(ep=2, dispatcher="hybridep"), None, "parallel.dispatcher=hybridep needs the library deep_ep"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="refused for want of a GPU")
def test_what_this_machine_lacks_is_one_line(parallel: ParallelConfig, fp8: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_transformer_config(moe_config(), parallel, torch.bfloat16, fp8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("capability", "recipe", "others"),
    [
        ((8, 0), "tensorwise", "null"),
        ((8, 9), "blockwise", "delayed, tensorwise, null"),
        ((9, 0), "mxfp8", "delayed, tensorwise, blockwise, null"),
        ((12, 0), "mxfp8", "delayed, tensorwise, blockwise, null"),
    ],
)
def test_recipes_by_architecture(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], recipe: str, others: str
) -> None:
    monkeypatch.setattr(gpu_features, "choose_implementation", lambda *_: Choice("te", "pretended"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    here = f"{capability[0]}.{capability[1]}"
    with pytest.raises(ConfigError, match=re.escape(f"compute capability {here}; use {others}")):
        check_gpu_features(moe_config(), ParallelConfig(), torch.bfloat16, recipe)
    for usable in others.split(", ")[:-1]:
        check_gpu_features(moe_config(), ParallelConfig(), torch.bfloat16, usable)


def test_deep_ep_that_is_too_old_or_not_for_this_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_features, "obstacle", lambda library: None if library == DEEP_EP else "pretended")
    monkeypatch.setitem(sys.modules, "deep_ep", ModuleType("deep_ep"))
    parallel = ParallelConfig(ep=2, dispatcher="hybridep")
    with pytest.raises(ConfigError, match="the version that is installed has no HybridEPBuffer"):
        check_gpu_features(moe_config(), parallel, torch.bfloat16, None)
    with pytest.raises(ConfigError, match="deepep sends bfloat16 only, but trainer.dtype=float32; set trainer.dtype"):
        check_gpu_features(moe_config(), ParallelConfig(ep=2, dispatcher="deepep"), torch.float32, None)
    check_gpu_features(moe_config(), ParallelConfig(ep=2, dispatcher="deepep"), torch.bfloat16, None)


@pytest.mark.latest
@pytest.mark.parametrize("dispatcher", ["deepep", "hybridep"])
def test_deep_ep_is_megatrons_flexible_dispatcher(monkeypatch: pytest.MonkeyPatch, dispatcher: str) -> None:
    monkeypatch.setattr(gpu_features, "_check_deep_ep", lambda *_: None)
    parallel = ParallelConfig(ep=2, dispatcher=dispatcher)
    config = build_transformer_config(moe_config(), parallel, torch.bfloat16)
    assert config.moe_token_dispatcher_type == "flex"
    assert config.moe_flex_dispatcher_backend == dispatcher
    assert build_transformer_config(dense_config(), ParallelConfig(pp=3), torch.float32).moe_token_dispatcher_type == (
        "alltoall"  # what a dense model has there decides whether lengths may differ
    )


@pytest.mark.latest
@pytest.mark.parametrize("module", ["core_attn", "mlp", "moe", "shared_experts"])
def test_recomputed_modules_run_twice_and_the_others_once(module: str) -> None:
    parallel = ParallelConfig(recompute="selective", recompute_modules=[module])
    check_layout(moe_config(), parallel)
    model = build_model(moe_config(), parallel=parallel)
    first, moe_layer = model.decoder.layers[0], model.decoder.layers[1]
    parts = {
        "core_attn": first.self_attention.core_attention,
        "mlp": first.mlp.linear_fc1,
        "moe": moe_layer.mlp.router,
        "shared_experts": moe_layer.mlp.shared_experts.linear_fc1,
    }
    runs: collections.Counter[str] = collections.Counter()
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: runs.update([name]))
    ids, position, carrier, masked = bdlm_inputs(moe_config(), [10, 6], 4)
    rows = masked.nonzero()[:, 0]
    out = model(ids, position, carrier, logit_rows_R=rows, labels_R=ids[0, rows + len(masked)])
    assert set(runs.values()) == {1}
    out.loss_sum.backward()
    twice = {"moe", "shared_experts"} if module == "moe" else {module}  # the shared expert is a part of the layer
    assert runs == {name: 2 if name in twice else 1 for name in parts}


@pytest.mark.latest
@pytest.mark.parametrize("modules", [["mlp"], ["moe"], ["core_attn", "shared_experts"]])
def test_recomputed_modules_give_the_same_gradients_and_loads(modules: list[str]) -> None:
    def measure(parallel: ParallelConfig) -> dict[str, torch.Tensor]:
        model = build_model(moe_config(), parallel=parallel)
        ids, position, carrier, masked = bdlm_inputs(moe_config(), [10, 6], 4)
        rows = masked.nonzero()[:, 0]
        padding = torch.zeros_like(ids, dtype=torch.bool)
        out = model(
            ids, position, carrier, padding_mask_BS=padding, logit_rows_R=rows, labels_R=ids[0, rows + len(masked)]
        )
        mask_carrier._cache.clear()
        out.loss_sum.backward()
        loads = {name: load for name, load in model.named_buffers() if name.endswith("tokens_per_expert")}
        assert loads
        return loads | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = measure(ParallelConfig())
    actual = measure(ParallelConfig(recompute="selective", recompute_modules=modules))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_overlap_reaches_the_wrappers(overlap: bool, distributed_optimizer: bool) -> None:
    parallel = ParallelConfig(overlap=overlap, distributed_optimizer=distributed_optimizer)
    (chunk,) = wrap_data_parallel([build_model(dense_config())], parallel)
    optimizer = build_optimizer(OptimizerConfig(), [chunk], parallel, torch.float32)
    gathers = overlap and distributed_optimizer
    assert chunk.ddp_config.overlap_grad_reduce is overlap
    assert chunk.ddp_config.overlap_param_gather is gathers
    assert chunk.ddp_config.use_distributed_optimizer is distributed_optimizer
    assert optimizer.chained_optimizers[0].config.overlap_param_gather is gathers
    hooked = {name for name, module in chunk.module.named_modules() if module._forward_pre_hooks}
    assert bool(hooked) is gathers  # they wait for the weights


def test_versions_name_deep_ep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "version", lambda name: "1.2" if name == "deep_ep" else None)
    assert capabilities.versions()["deep_ep"] == "1.2"
