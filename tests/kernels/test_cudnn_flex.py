"""The cuDNN backend against the reference, over a stand-in for the package; and its calls against the real package."""

from __future__ import annotations

import fcntl
import inspect
import os
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llada_kernels import BACKENDS, IntervalMask, choose_backend, interval_attention
from llada_kernels.backends import cudnn_cache, cudnn_flex, reference
from llada_kernels.backends.cudnn_flex import Plan

from tests.kernels import cudnn_stand_in
from tests.kernels.cases import Inputs, any_masks, assert_close, make_inputs, run
from tests.kernels.cudnn_stand_in import StandIn


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The backend, reachable as "cudnn" on the CPU, over a stand-in for the package."""
    stand_in = StandIn()
    monkeypatch.setattr(cudnn_flex, "_package", lambda device: stand_in)
    monkeypatch.setattr(cudnn_flex, "_launches", {})
    monkeypatch.setattr(cudnn_flex, "obstacle", lambda *inputs: None)
    monkeypatch.setitem(BACKENDS, "cudnn", cudnn_flex)
    return stand_in


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(any_masks(), st.sampled_from([(1, 1), (4, 4), (6, 2), (5, 1)]), st.integers(1, 3), st.sampled_from([8, 16]))
def test_equals_reference(
    package: StandIn, mask: IntervalMask, heads: tuple[int, int], batch: int, head_dim: int
) -> None:
    inputs = make_inputs(mask, *heads, batch=batch, head_dim=head_dim)
    assert_close(run(inputs, mask, "cudnn", scale=0.7), run(inputs, mask, "reference", scale=0.7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(package: StandIn, dtype: torch.dtype) -> None:
    mask = IntervalMask.block_diffusion([40, 24], 8)
    inputs = make_inputs(mask, 4, 2, dtype, head_dim=32)
    got, want = run(inputs, mask, "cudnn"), run(tuple(x.float() for x in inputs), mask, "reference")  # type: ignore[arg-type]
    assert got["lse"].dtype == torch.float32 and got["output"].dtype == got["key"].dtype == dtype
    for name, x in want.items():
        assert (got[name].float() - x).norm() / x.norm() < 2 * torch.finfo(dtype).eps, name


def test_whatever_may_compile_holds_the_lock(package: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real import, so that the order of import, environment and lock is tested as well."""
    monkeypatch.undo()
    for name in (cudnn_cache.ENABLED_VARIABLE, cudnn_cache.DIRECTORY_VARIABLE):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv(cudnn_cache.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv("FLEX_ATTENTION_ARCH", "sm_90")
    monkeypatch.setattr(cudnn_cache, "_directory", None)
    monkeypatch.setattr(cudnn_cache, "_compiled", set())
    monkeypatch.setattr(cudnn_flex, "_launches", {})
    locked: dict[str, bool] = {}

    def watched(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with (Path(os.environ[cudnn_cache.DIRECTORY_VARIABLE]) / "compile.lock").open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    locked[name] = False
                except BlockingIOError:
                    locked[name] = True
            return getattr(package, name)(*args, **kwargs)

        return call

    names = ("create_mask_plan", "FlexAttentionFwd", "FlexAttentionBwd")
    modules = {"cudnn": ModuleType("cudnn"), "cudnn.flex_attention": ModuleType("cudnn.flex_attention")}
    modules["cudnn"].flex_attention = modules["cudnn.flex_attention"]  # type: ignore[attr-defined]
    for name in names:
        setattr(modules["cudnn.flex_attention"], name, watched(name))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    cudnn_flex._package.cache_clear()
    for first, length in ((True, 8), (False, 16)):
        mask = IntervalMask.mdlm([length])
        query, key, value = (x.requires_grad_() for x in make_inputs(mask, 2, 1))
        cudnn_flex.attention(query, key, value, mask, 1.0)[0].sum().backward()
        assert locked == dict.fromkeys(names, first)  # another length compiles nothing
        locked.clear()
        cudnn_flex.attention(query, key, value, mask, 1.0)[1].sum().backward()
        assert locked == {"FlexAttentionBwd": first}  # with the gradient of the lse it is another kernel
    cudnn_flex._package.cache_clear()


def layers(inputs: Inputs, mask: IntervalMask, count: int) -> None:
    """Some layers with activation recomputation, forward and backward."""
    query, key, value = (x.clone().requires_grad_() for x in inputs)

    def layer(hidden: torch.Tensor) -> torch.Tensor:
        return interval_attention(hidden, key, value, mask, backend="cudnn")

    hidden = query
    for _ in range(count):
        hidden = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=True)
    hidden.square().sum().backward()


def test_one_plan_a_mask_and_one_compilation_a_shape(package: StandIn) -> None:
    mask = IntervalMask.block_diffusion([30, 20], 4)
    inputs, built = make_inputs(mask, 4, 2), Plan.built
    layers(inputs, mask, 3)
    assert Plan.built == built + 1 and package.count("create_mask_plan") == 1
    assert package.count("FlexAttentionFwd") == package.count("FlexAttentionBwd") == 1
    assert package.count("FlexAttentionFwd.execute") == 6 and package.count("FlexAttentionBwd.execute") == 3

    other = IntervalMask.block_diffusion([50], 8)  # as long, so nothing is compiled again
    layers(inputs, other, 1)
    assert Plan.built == built + 2
    assert package.count("FlexAttentionFwd") == package.count("FlexAttentionBwd") == 1

    with torch.inference_mode():
        interval_attention(*inputs, mask, backend="cudnn")
    assert [call[2]["build_backward"] for call in package.calls if call[0] == "create_mask_plan"] == [True, True, False]


def test_launches_are_kept_within_bounds(package: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_flex, "MAX_LAUNCHES", 4)
    for length in range(8, 16):
        mask = IntervalMask.mdlm([length])
        inputs = make_inputs(mask, 2, 1)
        assert_close(run(inputs, mask, "cudnn"), run(inputs, mask, "reference"))
        assert len(cudnn_flex._launches) <= 4


def test_sequence_first_layout_is_read_and_written_in_place(package: StandIn) -> None:
    mask = IntervalMask.block_diffusion([24, 8], 8)
    sequence_first = tuple(x.transpose(0, 1).contiguous() for x in make_inputs(mask, 4, 2, batch=2))
    query, key, value = (x.transpose(0, 1).requires_grad_() for x in sequence_first)
    output = interval_attention(query, key, value, mask, backend="cudnn")
    output.backward(torch.ones_like(output))
    assert output.transpose(0, 1).is_contiguous()
    assert all(x.grad is not None and x.grad.stride() == x.stride() for x in (query, key, value))
    name, args, _ = package.calls[-1]
    assert name == "FlexAttentionBwd.execute"
    assert [x.data_ptr() for x in args[:3]] == [x.data_ptr() for x in sequence_first]


def test_two_layouts_of_one_shape(package: StandIn) -> None:
    mask = IntervalMask.mdlm([6, 10])
    inputs = make_inputs(mask, 4, 2, batch=2)
    sequence_first = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs)
    want = run(inputs, mask, "reference")
    for variant in (inputs, sequence_first, inputs):
        assert_close(run(variant, mask, "cudnn"), want)  # type: ignore[arg-type]
    assert package.count("FlexAttentionFwd") == 2


def test_a_slice_of_one_projection_is_read_in_place(package: StandIn) -> None:
    mask = IntervalMask.mdlm([16])
    fused = torch.randn(16, 1, 2, 6, 8, requires_grad=True)  # [S, B, groups, 4 queries + key + value, D]
    query, key, value = (x.transpose(0, 1) for x in fused.split([4, 1, 1], 3))
    inputs = query.reshape(1, 16, 8, 8), key.flatten(2, 3), value.flatten(2, 3)
    want = torch.autograd.grad(interval_attention(*inputs, mask, backend="reference").sum(), fused, retain_graph=True)
    got = torch.autograd.grad(interval_attention(*inputs, mask, backend="cudnn").sum(), fused)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    args = next(call[1] for call in package.calls if call[0] == "FlexAttentionFwd.execute")
    assert args[2].data_ptr() == value.data_ptr()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x[:, :1].expand(x.shape),
        lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
        lambda x: x.repeat_interleave(4, -1)[..., ::4],
        lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
        lambda x: torch.nn.functional.pad(x, (0, 1))[..., :-1],
    ],
    ids=["expanded", "features apart", "every fourth feature", "address not aligned", "strides not aligned"],
)
def test_what_the_kernels_cannot_read_is_copied(package: StandIn, spoil: Any) -> None:
    mask = IntervalMask.mdlm([9, 7])
    inputs = tuple(spoil(x) for x in make_inputs(mask, 4, 2, batch=2))
    assert_close(run(inputs, mask, "cudnn"), run(inputs, mask, "reference"))  # type: ignore[arg-type]
    query, key, value = (x.detach().requires_grad_() for x in make_inputs(mask, 4, 2, batch=2))
    grads = []
    for backend in ("cudnn", "reference"):
        output = interval_attention(query, key, value, mask, backend=backend)
        grads.append(torch.autograd.grad(output, (query, key, value), spoil(output.detach().clone())))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_gradients_of_one_output_only_and_nan_where_nothing_is_seen(package: StandIn) -> None:
    mask = IntervalMask.block_diffusion([6, 4, 5], 4, padding=[False, True, False]).pad(40, 44)
    inputs = tuple(x.requires_grad_() for x in make_inputs(mask, 4, 2))
    blind = ~mask.dense().any(1)
    results: dict[str, list[torch.Tensor]] = {}
    for backend in ("cudnn", "reference"):
        output, lse = interval_attention(*inputs, mask, backend=backend, return_lse=True)
        assert (output[:, blind] == 0).all() and (lse[:, blind] == -torch.inf).all()
        grad_lse = lse.detach().masked_fill(lse == -torch.inf, torch.nan)
        grad_lse = grad_lse.clone(memory_format=torch.contiguous_format)  # the package wants heads before rows
        from_lse = torch.autograd.grad(lse, inputs[:2], grad_lse, retain_graph=True)
        results[backend] = [*from_lse, *torch.autograd.grad(output.square().sum(), inputs)]
    torch.testing.assert_close(results["cudnn"], results["reference"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("deterministic", [True, False])
def test_determinism_is_passed_on(package: StandIn, deterministic: bool) -> None:
    mask = IntervalMask.causal([12])
    run(make_inputs(mask, 2, 2), mask, "cudnn", deterministic=deterministic)
    assert [kw["deterministic"] for name, _, kw in package.calls if name == "FlexAttentionBwd"] == [deterministic]


@pytest.mark.parametrize(("rows", "keys"), [(0, 4), (4, 0)])
def test_nothing_to_attend(package: StandIn, rows: int, keys: int) -> None:
    mask = IntervalMask(torch.zeros(3, rows, dtype=torch.int32), keys)
    got = run(make_inputs(mask, 2, 1), mask, "cudnn")
    assert (got["output"] == 0).all() and (got["lse"] == -torch.inf).all() and not package.calls


def test_a_broken_mask_is_refused(package: StandIn) -> None:
    mask = IntervalMask(torch.tensor([[0] * 4, [3] * 4, [2] * 4], dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="nondecreasing"):
        interval_attention(*make_inputs(mask, 2, 2), mask, backend="cudnn")


def test_compiling_ahead_leaves_nothing_to_compile(package: StandIn) -> None:
    mask = IntervalMask.mdlm([16])
    inputs = make_inputs(mask, 4, 2)
    cudnn_flex.compile_kernels(*inputs, mask)
    compiled, built = package.count("FlexAttentionFwd") + package.count("FlexAttentionBwd"), Plan.built
    assert compiled == 3 and not any(call[0].endswith("execute") for call in package.calls)
    run(inputs, mask, "cudnn")
    query = inputs[0].clone().requires_grad_()
    interval_attention(query, *inputs[1:], mask, backend="cudnn").square().sum().backward()
    assert package.count("FlexAttentionFwd") + package.count("FlexAttentionBwd") == compiled and Plan.built == built


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "head_dim", "reason"),
    [
        ((9, 0), "1.32.0", torch.bfloat16, 128, None),
        ((10, 3), "1.32.0", torch.float16, 64, None),
        ((9, 0), "1.32.0", None, None, None),
        ((8, 0), "1.32.0", torch.bfloat16, 128, "no kernels for sm_80"),
        ((9, 0), None, torch.bfloat16, 128, "nvidia-cudnn-frontend 1.32.0 is not installed: pip install"),
        ((9, 0), "1.31.1", torch.bfloat16, 128, "1.31.1 is installed, it needs 1.32.0"),
        ((9, 0), "1.32.0", torch.float32, 128, "bfloat16 and float16, not float32"),
        ((9, 0), "1.32.0", torch.bfloat16, 100, "not 100"),
        ((9, 0), "1.32.0", torch.bfloat16, 256, "not 256"),
        (None, "1.32.0", torch.bfloat16, 128, "no CUDA device"),
    ],
)
def test_obstacles(
    capability: Any, installed: Any, dtype: Any, head_dim: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLEX_ATTENTION_ARCH", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(cudnn_cache, "installed_version", lambda: installed)
    monkeypatch.setattr("llada_kernels.attention.BACKENDS", {"cudnn": cudnn_flex, "reference": reference})
    cudnn_flex._missing.cache_clear()
    got = cudnn_flex.obstacle(torch.device("cuda"), dtype, head_dim)
    assert got is None if reason is None else got is not None and reason in got
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            choose_backend("cudnn", torch.device("cuda"), dtype, head_dim)
    cudnn_flex._missing.cache_clear()


def test_it_does_not_run_on_the_cpu() -> None:
    assert cudnn_flex.obstacle(torch.device("cpu"), torch.bfloat16, 128) == "it does not run on cpu"


def test_our_calls_fit_the_real_package(package: StandIn) -> None:
    if cudnn_cache.installed_version() is None:
        pytest.skip(f"{cudnn_cache.PACKAGE} is not installed")
    assert version(cudnn_cache.PACKAGE) == cudnn_flex.VERSION
    import cudnn.flex_attention as real

    ours = {
        "create_mask_plan": cudnn_stand_in.MaskPlan,
        "FlexAttentionFwd": cudnn_stand_in.Forward,
        "FlexAttentionBwd": cudnn_stand_in.Backward,
        "FlexAttentionFwd.execute": cudnn_stand_in.Forward.run,
        "FlexAttentionBwd.execute": cudnn_stand_in.Backward.run,
    }
    mask = IntervalMask.mdlm([8])
    run(make_inputs(mask, 4, 2), mask, "cudnn")
    assert {name for name, _, _ in package.calls} == set(ours)
    for name, args, kwargs in package.calls:
        function: Any = real
        for part in name.split("."):
            function = getattr(function, part)
        this = (None,) if name.endswith("execute") else ()
        bound, expected = (inspect.signature(f).bind(*this, *args, **kwargs).arguments for f in (function, ours[name]))
        assert {n: id(x) for n, x in bound.items()} == {n: id(x) for n, x in expected.items()}, name
