"""Megatron-Core on the CPU: only its modules see another torch, whatever the order of imports."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llada_mega.parallel import cpu_runtime, ensure_single_process

pytestmark = [pytest.mark.latest, pytest.mark.skipif(torch.cuda.is_available(), reason="a no-op with CUDA")]
ROOT = Path(__file__).resolve().parents[2]

FORWARD = """
from llada_kernels import IntervalMask
from llada_mega.config.model import ModelConfig, MoEConfig
from llada_mega.models import build_model, mask_carrier
config = ModelConfig(moe=MoEConfig(8, 4, 4, 2, 16, 16))
ids = torch.arange(6)[None]
model = build_model(config)
logits = model(ids, ids, mask_carrier.pack(IntervalMask.causal([6])))
logits.sum().backward()
assert logits.shape == (6, 256)
"""
BEFORE = "import torch\nimport megatron.core.transformer.moe.moe_layer, megatron.core.tensor_parallel\n" + FORWARD
AFTER = "import torch\nfrom llada_mega.parallel import cpu_runtime\ncpu_runtime.install()\n" + FORWARD
WITH_CUDA = """
import sys, torch
cuda_method = torch.Tensor.cuda
torch.cuda.is_available = lambda: True
from llada_mega.parallel import cpu_runtime
cpu_runtime.install()
import megatron.core.jit as jit
assert not cpu_runtime.is_installed() and torch.Tensor.cuda is cuda_method
assert not any(isinstance(finder, cpu_runtime._PatchOnImport) for finder in sys.meta_path)
assert jit.torch is torch
"""


@pytest.mark.parametrize("program", [BEFORE, AFTER, WITH_CUDA], ids=["megatron first", "install first", "with CUDA"])
def test_order_of_imports(program: str) -> None:
    run(program)


def run(program: str) -> None:
    """In a process of its own."""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.fixture
def megatron_torch():
    cpu_runtime.install()
    import megatron.core.pipeline_parallel.schedules as schedules

    return schedules.torch


def test_installing_twice_changes_nothing(megatron_torch) -> None:
    finders = list(sys.meta_path)
    cpu_runtime.install()
    assert sys.meta_path == finders


def test_megatron_asks_for_cuda_and_gets_the_cpu(megatron_torch) -> None:
    assert megatron_torch.zeros(2, device="cuda").device.type == "cpu"
    assert megatron_torch.ones(2, device=megatron_torch.cuda.current_device()).device.type == "cpu"
    assert megatron_torch.tensor([1.0], device=torch.device("cuda", 0), pin_memory=True).tolist() == [1.0]
    stream = megatron_torch.cuda.Stream()
    assert stream == megatron_torch.cuda.current_stream()
    with megatron_torch.cuda.stream(stream):
        stream.record_event().wait()
    assert megatron_torch.Tensor is torch.Tensor
    assert megatron_torch.nn.functional is torch.nn.functional


def test_torch_itself_is_untouched(megatron_torch) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_the_generator_tracker_restores_the_outer_state() -> None:
    from llada_mega.parallel import ensure_single_process

    ensure_single_process()
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.manual_seed(7)
    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with get_cuda_rng_tracker().fork():
        assert not torch.equal(torch.rand(3), inside)  # the tracker's own state has moved on
    with pytest.raises(KeyError, match="no generator state"), get_cuda_rng_tracker().fork("unknown"):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distributed", [False, True])
def test_optimizers_recognise_cpu_parameters(dtype: torch.dtype, distributed: bool) -> None:
    """Megatron's optimizers sort parameters by names such as torch.cuda.BFloat16Tensor."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from llada_mega.config.model import ModelConfig
    from llada_mega.models import build_model

    bare = build_model(ModelConfig(), dtype=dtype)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    model = DistributedDataParallel(bare.config, ddp_config, bare)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=0.1,
            clip_grad=1.0,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
        ),
        [model],
    )
    before = bare.decoder.final_layernorm.weight.clone()
    for parameter in bare.parameters():
        parameter.main_grad.fill_(1.0)
    succeeded, norm, _ = optimizer.step()
    assert succeeded
    assert norm == pytest.approx(sum(p.numel() for p in bare.parameters()) ** 0.5, rel=1e-3)
    assert not torch.equal(bare.decoder.final_layernorm.weight, before)
    assert torch.zeros(1, dtype=dtype).type() != "torch.cuda.FloatTensor"


def test_the_gradient_norm_does_not_depend_on_how_a_matrix_is_split() -> None:
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    gradient = torch.randn(8_000_000, generator=torch.Generator().manual_seed(0))
    exact = float(gradient.double().norm())
    ensure_single_process()
    for parts in (1, 2, 64):
        norm = get_grad_norm_fp32(list(gradient.chunk(parts)), grad_stats_parallel_group=torch.distributed.group.WORLD)
        assert norm == pytest.approx(exact, rel=1e-7)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="thresholds of glibc's allocator")
def test_memory_of_a_step_is_there_for_the_next() -> None:
    """100 MiB in pieces of 1 MiB, freed and asked for again: without the 25600 page faults that there are otherwise."""
    script = """
import resource, torch
from llada_mega.parallel import cpu_runtime
cpu_runtime.install()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**18) for _ in range(100)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
assert faults() > 10_000 > 10 * faults()
"""
    run(script)
