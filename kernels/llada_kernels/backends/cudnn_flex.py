"""The cuDNN backend: ``cudnn.flex_attention`` of nvidia-cudnn-frontend, fused kernels for Hopper and Blackwell.

The package takes interval endpoints as they are, skips tiles that nobody sees and leaves out the mask in tiles that
everybody sees. Its plan of a mask costs some small kernels and one wait for the device; it is made once a mask and
shared by all layers, by backward and by the second forward of activation recomputation. Its kernels are compiled when
they are first needed, for a dtype, a head dim, a ratio of query to key heads and the options below, and for any
length, batch, number of heads or mask; ``cudnn_cache`` keeps them for the next process. Outputs and gradients take the
memory layout of their inputs, so ``[S, B, H, D]`` seen as ``[B, S, H, D]`` costs no copy. The workspace of backward
comes from PyTorch's allocator and goes back after each call: layers reuse one block.

The package calls itself experimental, so its version is pinned. What is proved without a GPU: that our calls fit its
signatures, that its kernels compile, and (against a stand-in that computes with the reference) everything here that is
not the package. Whether the kernels are right and how fast they are is for ``make test-gpu`` and ``make bench-kernels``
to say: no GPU has run this module yet.

Legend: B batch, S rows, K keys, H heads, D head dim.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Hashable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llada_kernels.backends import cudnn_cache, reference
from llada_kernels.interval_mask import IntervalMask

SUMMARY = "cudnn.flex_attention: fused kernels that skip tiles nobody sees"
VERSION = "1.32.0"
ARCHITECTURES = ("sm_90", "sm_100", "sm_103")
DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 128  # the package also takes 256, without the gradient of the lse
ALIGNMENT = 16  # bytes, of addresses and strides
# Compiled launches are kept by exact shapes and strides, of which variable lengths make many; they are small.
MAX_LAUNCHES = 1024


def obstacle(device: torch.device, dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    """It needs a Hopper or Blackwell GPU, the pinned package, 16-bit floats and a head dim up to 128."""
    if device.type != "cuda":
        return f"it does not run on {device.type}"
    if dtype is not None and dtype not in DTYPES:
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim is not None and (head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM):
        return f"it takes head dims that are multiples of 8 up to {MAX_HEAD_DIM}, not {head_dim}"
    return _missing(device)


@functools.cache  # it is asked at every call
def _missing(device: torch.device) -> str | None:
    """What this machine lacks."""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if architecture(device) not in ARCHITECTURES:
        return f"it has no kernels for {architecture(device)}, only for {', '.join(ARCHITECTURES)}"
    installed = cudnn_cache.installed_version()
    if installed is None:
        return f"{cudnn_cache.PACKAGE} {VERSION} is not installed: pip install 'llada-mega[gpu]'"
    if installed != VERSION:
        return f"{cudnn_cache.PACKAGE} {installed} is installed, it needs {VERSION}: pip install 'llada-mega[gpu]'"
    return None


def attention(
    query_BSHD: Tensor,
    key_BKHD: Tensor,
    value_BKHD: Tensor,
    mask: IntervalMask,
    scale: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """Fused attention over the visible tiles; memory O(S). The package refuses endpoints that are no valid mask."""
    if query_BSHD.numel() == 0 or key_BKHD.numel() == 0:  # the package has no launch for these
        return reference.attention(query_BSHD, key_BKHD, value_BKHD, mask, scale, deterministic)
    query, key, value = (_aligned(x) for x in (query_BSHD, key_BKHD, value_BKHD))
    plan = Plan.of(mask, query, key, value)
    return _FlexAttention.apply(query, key, value, plan, scale, deterministic)


def compile_kernels(
    query_BSHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor, mask: IntervalMask, deterministic: bool = True
) -> None:
    """Build the plan and compile forward and backward, without and with a gradient of the lse; run nothing.

    Arguments as in ``attention``; fake tensors do, so a machine without a GPU can compile.
    """
    plan = Plan.of(mask, query_BSHD, key_BKHD, value_BKHD)
    output, lse = _outputs(query_BSHD)
    inputs = (query_BSHD, key_BKHD, value_BKHD)
    plan.forward(*inputs, output, lse)
    for grad_lse in (None, lse):
        plan.backward(*inputs, output, output, lse, *inputs, grad_lse=grad_lse, deterministic=deterministic)


@dataclass(frozen=True, eq=False)
class Plan:
    """The package's plan of a mask for inputs of one shape, and the launches that use it."""

    built: ClassVar[int] = 0  # plans built in this process; tests read it

    mask_plan: Any
    kernels: tuple[Hashable, ...]  # what compiled kernels depend on, apart from the options of a launch

    @classmethod
    def of(cls, mask: IntervalMask, query: Tensor, key: Tensor, value: Tensor) -> Plan:
        """The plan of ``mask`` for such inputs, built on first use and kept on the mask.

        It serves backward too, unless inference mode rules that out: without gradients we may be in the first forward
        of activation recomputation.
        """
        batch, _, heads, head_dim = query.shape
        backward = not torch.is_inference_mode_enabled()
        shape = (batch, heads, key.shape[2], head_dim, query.dtype, backward)
        plan = mask.plans.get(("cudnn", shape))
        if plan is None:
            cls.built += 1
            kernels = (query.dtype, head_dim, heads // key.shape[2], heads, backward)
            endpoints = mask.endpoints.repeat(1, 1, batch)  # [1, nfunc, rows of all batch entries]
            flex = _package(query.device)
            with cudnn_cache.first_use(("plan", *kernels)):
                plan = cls(flex.create_mask_plan(endpoints, query, key, value, build_backward=backward), kernels)
            mask.plans["cudnn", shape] = plan
        return plan

    def forward(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor) -> Any:
        """The compiled forward of such tensors; lse float32 ``[B, H, S]``."""
        return self._launch("FlexAttentionFwd", query, key, value, output, self.mask_plan, lse)

    def backward(self, *tensors: Tensor, grad_lse: Tensor | None, deterministic: bool) -> Any:
        """The compiled backward of query, key, value, output, its gradient, lse and the gradients to be written."""
        return self._launch("FlexAttentionBwd", *tensors, self.mask_plan, grad_lse, deterministic=deterministic)

    def _launch(self, name: str, *samples: Any, **options: bool) -> Any:
        query, forms = samples[0], [(x.shape, x.stride()) for x in samples if isinstance(x, Tensor)]
        kernels = (name, len(forms), *options.values(), *self.kernels)
        key = (kernels, query.device, *forms)
        launch = _launches.get(key)
        if launch is None:
            if len(_launches) >= MAX_LAUNCHES:
                _launches.clear()
            flex = _package(query.device)
            with cudnn_cache.first_use(kernels):
                launch = getattr(flex, name)(*samples, **options)
                launch.check_support()
                launch.compile()
            _launches[key] = launch
        return launch


_launches: dict[Hashable, Any] = {}


class _FlexAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, deterministic: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.scale, ctx.deterministic = plan, scale, deterministic
        output, lse_BHS = _outputs(query)
        launch = plan.forward(query, key, value, output, lse_BHS)
        workspace = _workspace(launch, query.device)
        launch.execute(query, key, value, output, plan.mask_plan, lse_BHS, workspace=workspace, softmax_scale=scale)
        ctx.save_for_backward(query, key, value, output, lse_BHS)
        return output, lse_BHS.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> Any:
        plan: Plan = ctx.plan
        query, key, value, output, lse_BHS = ctx.saved_tensors
        grad_output = torch.zeros_like(output) if grad_output is None else _aligned(grad_output)
        if grad_lse is not None:
            # A merge of partial results may send NaN to the lse of rows that see nothing, and 0 * NaN is NaN.
            grad_lse = grad_lse.transpose(1, 2).masked_fill(lse_BHS == -math.inf, 0.0).contiguous()
        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        tensors = (query, key, value, output, grad_output, lse_BHS, *grads)
        launch = plan.backward(*tensors, grad_lse=grad_lse, deterministic=ctx.deterministic)
        workspace = _workspace(launch, query.device)
        launch.execute(*tensors, plan.mask_plan, grad_lse, workspace=workspace, softmax_scale=ctx.scale)
        return *grads, None, None, None


def architecture(device: torch.device) -> str:
    """Such as "sm_90"; the package's variable for compiling without a GPU comes first."""
    named = os.environ.get("FLEX_ATTENTION_ARCH")
    return named or "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def _package(device: torch.device) -> ModuleType:
    cudnn_cache.enable(architecture(device))
    import cudnn.flex_attention

    return cudnn.flex_attention


def _outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """Empty output in the memory layout of the query, and lse as the package wants it, float32 ``[B, H, S]``."""
    batch, rows, heads, _ = query.shape
    return torch.empty_like(query), query.new_empty(batch, heads, rows, dtype=torch.float32)


def _workspace(launch: Any, device: torch.device) -> Tensor:
    return torch.empty(launch.workspace_size, dtype=torch.uint8, device=device)


def _aligned(x: Tensor) -> Tensor:
    """``x``, copied where the kernels cannot read it in place; strides of 0 would make the package compile again."""
    step = ALIGNMENT // x.element_size()
    in_place = x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT == 0
    if in_place and all(stride and stride % step == 0 for stride in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)
