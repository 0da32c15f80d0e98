"""The Triton backend without a GPU: its kernels in Triton's interpreter, and compiled for three architectures."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llada_kernels.backends import triton_tiles

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
not_interpreted = pytest.mark.skipif(triton_tiles.interpreted(), reason="TRITON_INTERPRET=1 leaves nothing to compile")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.slow
@needs_triton
def test_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    tests = Path(__file__).with_name("triton_in_interpreter.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@needs_triton
@not_interpreted
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("arch", "matrix"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_compiled_kernels_fit(arch: int, matrix: str, head_dim: int) -> None:
    """No register spills, shared memory suffices, and every product of tiles is the architecture's own."""
    from llada_kernels.backends.triton_compile import SHARED_MEMORY, compile_kernels

    kernels = compile_kernels(arch, head_dim)
    assert [kernel.name for kernel in kernels] == [
        "forward_kernel",
        "statistics_kernel",
        "query_gradient_kernel",
        "key_value_gradient_kernel",
    ]
    for kernel in kernels:
        assert kernel.local == 0, kernel
        assert kernel.shared <= SHARED_MEMORY[arch], kernel
        assert set(kernel.matrix) == (set() if kernel.name == "statistics_kernel" else {matrix}), kernel


@pytest.mark.slow
@needs_triton
@not_interpreted
def test_the_table_is_printed() -> None:
    command = [sys.executable, "-m", "llada_kernels.backends.triton_compile", "--arch", "90", "--head-dim", "64"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 5 and "key_value_gradient_kernel" in lines[4] and "HGMMA" in lines[4]


@needs_triton
def test_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "does not run on cpu" in str(triton_tiles.obstacle(CPU, None, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_tiles.obstacle(CUDA, None, None) == "PyTorch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or later" in str(triton_tiles.obstacle(CUDA, None, None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert triton_tiles.obstacle(CUDA, torch.bfloat16, 128) is None
    assert triton_tiles.obstacle(CUDA, None, None) is None
    assert "float64" in str(triton_tiles.obstacle(CUDA, torch.float64, 128))
    assert "head dim 320" in str(triton_tiles.obstacle(CUDA, torch.bfloat16, 320))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_tiles.obstacle(CPU, torch.float32, 128) is None
    assert "bfloat16" in str(triton_tiles.obstacle(CPU, torch.bfloat16, 128))
    assert "does not run on cuda" in str(triton_tiles.obstacle(CUDA, None, None))


def test_importing_the_backend_does_not_import_triton() -> None:
    code = "import sys; import llada_kernels.backends.triton_tiles; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton_tiles.obstacle(CUDA, torch.bfloat16, 128) == "triton is not installed"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("dtype", triton_tiles.DTYPES, ids=str)
def test_launches(capability: tuple[int, int], dtype: torch.dtype) -> None:
    """There is one for each head dim, and row tiles divide the padding of the backward's statistics."""
    for head_dim in range(1, triton_tiles.MAX_HEAD_DIM + 1):
        launches = triton_tiles.choose_launches(capability, dtype, head_dim)
        for launch in (launches.forward, launches.query, launches.key_value):
            assert triton_tiles.PADDED_ROWS % launch.block_m == 0
