"""``python -m aot``: compile the GPU kernels ahead of time and look at the machine code, without a GPU.

Prints registers, memory and instruction counts of every kernel, leaves the CUBINs and a JSON file, and fails when a
kernel uses more local memory (spilled registers) than is known. Whether results are right needs a GPU to say.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aot.cubin import GROUPS, embedded_cubins, read_kernels
from llada_kernels.backends import cudnn_cache

ARCHITECTURES = ("sm_90a", "sm_100a")
PACKAGES = ("torch", "nvidia-cudnn-frontend", "nvidia-cutlass-dsl", "apache-tvm-ffi", "cuda-bindings", "triton")
# Local memory that is known: (architecture, kernel) -> instructions. The deterministic backward for Blackwell keeps one
# address there, with one store at its start and one load.
KNOWN_LOCAL = {("sm_100a", "bwd"): 2}
NUMBERS = ("registers", "stack", "shared", "instructions", *GROUPS)


def main() -> int:
    """Exit status: 0, 1 for kernels that do not compile or that spill, 2 for what is missing here."""
    parser = argparse.ArgumentParser(prog="python -m aot", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--if-warm", nargs="+", default=[], choices=ARCHITECTURES, help="too, if compiled here before")
    parser.add_argument("--output", type=Path, default=Path("build/kernels-aot"))
    options = parser.parse_args()
    missing = [name for name in PACKAGES if not _version(name)]
    if missing:
        print(f"error: not installed: {', '.join(missing)}; `make kernels-aot` makes an environment", file=sys.stderr)
        return 2

    spilling: list[str] = []
    for arch in dict.fromkeys([*options.arch, *(arch for arch in options.if_warm if is_warm(arch))]):
        started = time.monotonic()
        objects = compile_cudnn(arch)
        if objects is None:
            print(f"error: the cuDNN kernels do not compile for {arch}", file=sys.stderr)
            return 1
        seconds = time.monotonic() - started
        for stale in (options.output / arch).glob("*.cubin"):
            stale.unlink()
        kernels = [kernel for path, use in objects.items() for kernel in inspect(path, use, options.output / arch)]
        print(f"\n{arch}: {len(kernels)} kernels in {seconds:.0f} s\n{table(kernels)}")
        packages = {name: _version(name) for name in PACKAGES}
        report = {"arch": arch, "packages": packages, "seconds": round(seconds, 1), "kernels": kernels}
        (options.output / f"{arch}.json").write_text(json.dumps(report, indent=1) + "\n")
        spilling += [f"{arch} {row['kernel']} ({row['model']}, {row['cubin']})" for row in kernels if spills(arch, row)]
    for name in spilling:
        print(f"error: registers of {name} spill to local memory", file=sys.stderr)
    return 1 if spilling else 0


def compile_cache(arch: str) -> Path:
    """Where compiled kernels of ``arch`` are kept between runs."""

    return cudnn_cache.cache_directory(f"{arch}-aot")


def is_warm(arch: str) -> bool:
    """Whether ``arch`` has been compiled on this machine: seconds instead of minutes."""
    return any(compile_cache(arch).rglob("*.o"))


def compile_cudnn(arch: str) -> dict[Path, str] | None:
    """Object files of the cuDNN backend and what needed each first; None when they do not compile.

    In a process of its own: environment variables fix the architecture when the package is imported.
    """

    environment = {
        **os.environ,
        "FLEX_ATTENTION_ARCH": arch.rstrip("a"),
        "CUTE_DSL_ARCH": arch,
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # the package reads addresses of fake tensors, which PyTorch deprecates
        cudnn_cache.ENABLED_VARIABLE: "1",
        cudnn_cache.DIRECTORY_VARIABLE: str(compile_cache(arch)),
    }
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "objects.json"
        command = [sys.executable, "-m", "aot.cudnn_kernels", str(result)]
        if subprocess.run(command, env=environment, check=False).returncode:
            return None
        return {Path(path): use for path, use in json.loads(result.read_text()).items()}


def inspect(object_file: Path, model: str, folder: Path) -> list[dict[str, Any]]:
    """The kernels of one object file; their CUBIN is left in ``folder``."""
    step = object_file.parent.name.removeprefix("arbitrary_")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for cubin in embedded_cubins(object_file.read_bytes()):
        path = folder / f"{step}-{object_file.stem[:8]}.cubin"
        path.write_bytes(cubin)
        for kernel in read_kernels(path):
            part = re.match(r"kernel_cutlass_(\w+?)_kernel_", kernel.name)
            numbers = {name: kernel.count(name) if name in GROUPS else getattr(kernel, name) for name in NUMBERS}
            label = f"{step}.{part[1]}" if part else step
            rows.append({"kernel": label, "model": model, **numbers, "spills": kernel.spills, "cubin": path.name})
    return rows


def spills(arch: str, row: dict[str, Any]) -> bool:
    """Whether a kernel uses more local memory than is known."""
    return bool(row["spills"]) and row["local"] > KNOWN_LOCAL.get((arch, row["kernel"]), 0)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows under their headings; stack and shared in bytes."""
    names = ("kernel", "model", *NUMBERS)
    lines = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join(
        "  ".join(cell.rjust(w) if cell.isdigit() else cell.ljust(w) for cell, w in zip(line, widths, strict=True))
        for line in lines
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
