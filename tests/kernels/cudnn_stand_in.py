"""A stand-in for ``cudnn.flex_attention`` that runs on the CPU: same calls, same demands on tensors, plain mathematics.

Written from the package's documentation and checks, not from our backend, so that a backend that passes shapes,
layouts or signs which the package would not take fails here. ``test_cudnn_flex`` binds every call that was made to the
real signatures where the package is installed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16


class StandIn:
    """The module: ``create_mask_plan``, ``FlexAttentionFwd``, ``FlexAttentionBwd``, and what was asked of them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.create_mask_plan = self._recorded("create_mask_plan", MaskPlan)
        self.FlexAttentionFwd = self._recorded("FlexAttentionFwd", Forward)
        self.FlexAttentionBwd = self._recorded("FlexAttentionBwd", Backward)

    def _recorded(self, name: str, make: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            made = make(*args, **kwargs)
            made.record = lambda a, k: self.calls.append((name + ".execute", a, k))
            return made

        return call

    def count(self, name: str) -> int:
        return sum(call[0] == name for call in self.calls)


class MaskPlan:
    def __init__(self, mask_func: Tensor, q: Tensor, k: Tensor, v: Tensor, *, build_backward: bool | None = None):
        batch, rows, heads, _ = q.shape
        assert mask_func.dtype == torch.int32 and mask_func.is_contiguous()
        assert mask_func.dim() == 3 and mask_func.shape[0] in (1, heads) and mask_func.shape[2] == batch * rows
        assert mask_func.shape[1] % 2 == 1 and v.shape == k.shape and heads % k.shape[2] == 0
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        if bool((mask_func < 0).any() | (mask_func > k.shape[1]).any() | (mask_func.diff(dim=1) < 0).any()):
            raise ValueError("mask_func endpoints must lie in each row's local-K range and be nondecreasing")
        self.shapes, self.has_backward = (q.shape, k.shape), bool(build_backward)
        key = torch.arange(k.shape[1])
        bound = mask_func[0].reshape(-1, batch, rows, 1)
        visible = key < bound[0]
        for i in range(1, len(bound), 2):
            visible = visible | ((key >= bound[i]) & (key < bound[i + 1]))
        self.visible_B1SK = visible[:, None]


class _Api:
    """Compile for sample tensors, then execute on tensors of exactly that form."""

    workspace_size: int

    def __init__(self, plan: MaskPlan, **samples: Tensor | None) -> None:
        assert isinstance(plan, MaskPlan)
        self.plan, self.samples, self.state = plan, samples, "new"

    def check_support(self) -> bool:
        self.check(self.plan, **self.samples)
        self.state = "supported"
        return True

    def compile(self) -> None:
        assert self.state == "supported"
        self.forms = {name: x is not None and (x.shape, x.stride(), x.dtype) for name, x in self.samples.items()}
        self.state, self.samples = "compiled", {}

    def check(self, plan: MaskPlan, **tensors: Tensor | None) -> None:
        assert plan.shapes == (tensors["q"].shape, tensors["k"].shape)  # type: ignore[union-attr]
        for name, x in tensors.items():
            if x is None:
                continue
            alignment = 4 if "lse" in name else ALIGNMENT
            assert x.stride(-1) == 1 and x.data_ptr() % alignment == 0, name
            assert all(stride * x.element_size() % alignment == 0 for stride in x.stride()[:-1]), (name, x.stride())
            assert 0 not in x.stride(), f"{name}: a broadcast dimension compiles another kernel"
            if "lse" in name:
                batch, rows, heads, _ = plan.shapes[0]
                assert x.shape == (batch, heads, rows) and x.dtype == torch.float32, name
            else:
                assert x.shape == plan.shapes["k" in name or "v" in name] and x.dtype == tensors["q"].dtype, name  # type: ignore[union-attr]

    def checked(self, plan: MaskPlan, workspace: Tensor | None, **tensors: Tensor | None) -> None:
        assert self.state == "compiled"
        assert self.forms == {name: x is not None and (x.shape, x.stride(), x.dtype) for name, x in tensors.items()}
        self.check(plan, **tensors)
        assert workspace is not None and workspace.dtype == torch.uint8 and workspace.numel() >= self.workspace_size


class Forward(_Api):
    workspace_size = 128

    def __init__(
        self, sample_q: Any, sample_k: Any, sample_v: Any, sample_o: Any, sample_mask_plan: Any, sample_lse: Any
    ):
        super().__init__(sample_mask_plan, q=sample_q, k=sample_k, v=sample_v, o=sample_o, lse=sample_lse)

    def execute(self, *args: Any, **kwargs: Any) -> None:
        self.record(args, kwargs)  # type: ignore[attr-defined]
        self.run(*args, **kwargs)

    def run(
        self,
        q_tensor: Tensor,
        k_tensor: Tensor,
        v_tensor: Tensor,
        o_tensor: Tensor,
        mask_plan: MaskPlan,
        lse_tensor: Tensor,
        *,
        workspace: Tensor | None = None,
        softmax_scale: float,
    ) -> None:
        self.checked(mask_plan, workspace, q=q_tensor, k=k_tensor, v=v_tensor, o=o_tensor, lse=lse_tensor)
        score = _scores(q_tensor, k_tensor, mask_plan, softmax_scale)
        lse = score.logsumexp(-1)
        probability = (score - lse[..., None]).exp().nan_to_num(0.0)
        value = _heads(v_tensor, q_tensor.shape[2])
        o_tensor.copy_((probability @ value).transpose(1, 2))
        lse_tensor.copy_(lse)


class Backward(_Api):
    workspace_size = 4096

    def __init__(
        self,
        sample_q: Any,
        sample_k: Any,
        sample_v: Any,
        sample_o: Any,
        sample_do: Any,
        sample_lse: Any,
        sample_dq: Any,
        sample_dk: Any,
        sample_dv: Any,
        sample_mask_plan: Any,
        sample_dlse: Any = None,
        *,
        deterministic: bool = False,
    ):
        assert type(deterministic) is bool and sample_mask_plan.has_backward
        names = ("q", "k", "v", "o", "do", "lse", "dq", "dk", "dv", "dlse")
        samples = (sample_q, sample_k, sample_v, sample_o, sample_do, sample_lse, sample_dq, sample_dk, sample_dv)
        super().__init__(sample_mask_plan, **dict(zip(names, (*samples, sample_dlse), strict=True)))

    def execute(self, *args: Any, **kwargs: Any) -> None:
        self.record(args, kwargs)  # type: ignore[attr-defined]
        self.run(*args, **kwargs)

    def run(
        self,
        q_tensor: Tensor,
        k_tensor: Tensor,
        v_tensor: Tensor,
        o_tensor: Tensor,
        do_tensor: Tensor,
        lse_tensor: Tensor,
        dq_tensor: Tensor,
        dk_tensor: Tensor,
        dv_tensor: Tensor,
        mask_plan: MaskPlan,
        dlse_tensor: Tensor | None = None,
        *,
        workspace: Tensor | None,
        softmax_scale: float,
    ) -> None:
        inputs = {"q": q_tensor, "k": k_tensor, "v": v_tensor, "o": o_tensor, "do": do_tensor, "lse": lse_tensor}
        outputs = {"dq": dq_tensor, "dk": dk_tensor, "dv": dv_tensor}
        self.checked(mask_plan, workspace, **inputs, **outputs, dlse=dlse_tensor)
        heads, key_heads = q_tensor.shape[2], k_tensor.shape[2]
        query, grad, output = (_heads(x, heads) for x in (q_tensor, do_tensor, o_tensor))
        key, value = _heads(k_tensor, heads), _heads(v_tensor, heads)
        # lse_log2 is 0 where lse is -inf; the probabilities of such rows are 0 by the mask.
        lse = lse_tensor.masked_fill(lse_tensor == -math.inf, 0.0)
        probability = (_scores(q_tensor, k_tensor, mask_plan, softmax_scale) - lse[..., None]).exp()
        delta = (grad * output).sum(-1) - (0.0 if dlse_tensor is None else dlse_tensor)
        grad_score = probability * (grad @ value.transpose(-1, -2) - delta[..., None]) * softmax_scale
        dq_tensor.copy_((grad_score @ key).transpose(1, 2))
        for target, full in ((dk_tensor, grad_score.mT @ query), (dv_tensor, probability.mT @ grad)):
            target.copy_(full.unflatten(1, (key_heads, -1)).sum(2).transpose(1, 2))


def _heads(x_BSHD: Tensor, heads: int) -> Tensor:
    """``[B, heads, S, D]`` in float32, key heads repeated."""
    return x_BSHD.float().repeat_interleave(heads // x_BSHD.shape[2], 2).transpose(1, 2)


def _scores(query: Tensor, key: Tensor, plan: MaskPlan, scale: float) -> Tensor:
    heads = query.shape[2]
    return (_heads(query, heads) @ _heads(key, heads).mT * scale).masked_fill(~plan.visible_B1SK, -math.inf)
