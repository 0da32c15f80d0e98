"""Compiles the Triton kernels for GPUs that are not here, and prints what they use.

    python -m llada_kernels.backends.triton_compile --arch 80 90 100 --head-dim 64 128

The backend itself runs, under a driver that loads every compiled kernel into a list and launches none: what is compiled
is what such a GPU would be given, specialisations included.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llada_kernels.backends import triton_tiles
from llada_kernels.backends.triton_tiles import Launches
from llada_kernels.interval_mask import IntervalMask

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
# Triton keeps what it compiled for a device, longer than a driver lives: each driver has a number of its own.
_devices = itertools.count()
_MATRIX = re.compile(r"\b(?:HMMA|HGMMA|UTC[A-Z]*MMA)\b")
# Shared memory that one program can have, in bytes, by compute capability (CUDA programming guide, table of limits).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Kernel:
    """What one compiled kernel uses."""

    name: str
    registers: int  # a thread
    local: int  # bytes a thread of local memory: spilled registers
    shared: int  # bytes a program
    matrix: Counter[str]  # matrix instructions in its code: HMMA (8.0), HGMMA (9.0: warp groups), UTC...MMA (10.0)
    cubin: bytes = field(repr=False)


class RecordingDriver:
    """Triton's driver interface for a GPU that is not here; ``kernels`` holds what was loaded."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.device = next(_devices)
        self.kernels: list[Kernel] = []
        self.utils = SimpleNamespace(
            load_binary=self._load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": sys.maxsize},  # the table shows what is too much
        )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: None

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        usage = _cuobjdump(binary, "--dump-resource-usage")
        registers, stack, local = (int(n) for n in _USAGE.findall(usage)[0])
        matrix = Counter(_MATRIX.findall(_cuobjdump(binary, "--dump-sass")))
        self.kernels.append(Kernel(name, registers, stack + local, shared, matrix, binary))
        return object(), object(), registers, 0, 1024


def compile_kernels(
    arch: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    heads: tuple[int, int] = (8, 2),
    launches: Launches | None = None,
) -> list[Kernel]:
    """The kernels of forward and backward for a compute capability (90 for 9.0), compiled and not run.

    Args:
        arch: compute capability times ten.
        head_dim, dtype: of query, key and value.
        heads: of the query, and of key and value.
        launches: default as shipped.
    """
    from triton.runtime import driver

    launches = launches or triton_tiles.choose_launches(divmod(arch, 10), dtype, head_dim)
    mask = IntervalMask.block_diffusion([16], 4)
    query = torch.empty(1, mask.total_q, heads[0], head_dim, dtype=dtype)
    key = torch.empty(1, mask.total_k, heads[1], head_dim, dtype=dtype)
    recorder = RecordingDriver(arch)
    driver.set_active(recorder)
    try:
        output, lse = triton_tiles.forward(query, key, key, mask, 1.0, launches.forward)
        grads = (torch.empty_like(output), torch.empty_like(lse).transpose(1, 2))
        triton_tiles.backward(query, key, key, output, lse, *grads, mask, 1.0, launches)
    finally:
        driver.set_active(None)
    return recorder.kernels


def table(archs: Sequence[int], head_dims: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> Iterator[str]:
    """Lines of a table of what the shipped kernels use."""
    yield "arch  head dim  kernel                     tile       warps  stages  registers  local  shared KiB    code"
    for arch in archs:
        for head_dim in head_dims:
            launches = triton_tiles.choose_launches(divmod(arch, 10), dtype, head_dim)
            of = {"forward": launches.forward, "query": launches.query, "key": launches.key_value}
            for kernel in compile_kernels(arch, head_dim, dtype):
                launch = of.get(kernel.name.split("_")[0])
                tile = f"{launch.block_m} x {launch.block_n}" if launch else ""
                warps, stages = (launch.num_warps, launch.num_stages) if launch else ("", "")
                matrix = ", ".join(f"{count} {name}" for name, count in kernel.matrix.items())
                yield (
                    f"{arch:4}  {head_dim:8}  {kernel.name:25}  {tile:9}  {warps:5}  {stages:6}  {kernel.registers:9}  "
                    f"{kernel.local:5}  {kernel.shared / 1024:5.1f} of {SHARED_MEMORY[arch] // 1024}  {matrix}"
                )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compile the attention kernels without a GPU and print what they use.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=SHARED_MEMORY)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    for line in table(arguments.arch, arguments.head_dim, getattr(torch, arguments.dtype)):
        print(line, flush=True)


def _cuobjdump(binary: bytes, option: str) -> str:
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
