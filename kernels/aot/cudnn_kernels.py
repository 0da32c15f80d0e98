"""Compile the cuDNN backend's kernels for one architecture, on a machine that needs no GPU.

It goes through the backend's own ``compile_kernels`` on fake CUDA tensors. Four small kernels that a real plan also
launches (its workspace, its scan, its two schedules) are left out: the package does not ask for them there.

Fake tensors give some arguments a more general layout than real ones while the package's cache keys stay the same, so
these kernels have a cache of their own that no training run reads. Run by ``python -m aot``, which sets the environment
variables that fix the architecture when the package is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from llada_kernels import IntervalMask
from llada_kernels.backends import cudnn_cache, cudnn_flex
from torch._subclasses.fake_tensor import FakeTensorMode

MODELS = {"mini": (16, 4), "flash": (32, 4)}  # query and key heads of Ling-mini and Ling-flash; TP keeps their ratio
HEAD_DIM = 128
# [noisy ; clean] of 4096 tokens, then what must not compile anything new: MDLM's mask, another length, a batch.
TRAINED = (1, 8192, 5)
OTHERS = {"mdlm": (1, 4096, 3), "another length": (1, 1000, 5), "a batch of two": (2, 2048, 5)}


def main(result: Path) -> None:
    """Compile, and write the object file of each kernel and what needed it first to ``result`` (JSON).

    "any order" is the backward that is not deterministic.

    Raises:
        RuntimeError: a kernel turned out to be specialised on a length, a batch or a mask.
    """
    asked = import_package()
    used: dict[Path, str] = {}
    with FakeTensorMode():
        for deterministic in (True, False):
            for model, heads in MODELS.items():
                started = time.monotonic()
                compile_for(*heads, *TRAINED, deterministic)
                label = model if deterministic else f"{model}, any order"
                new = dict.fromkeys(asked - used.keys(), label)
                print(f"{label}: {len(new)} kernels, {time.monotonic() - started:.0f} s", file=sys.stderr)
                used |= new
        for label, shape in OTHERS.items():
            for heads in MODELS.values():
                compile_for(*heads, *shape, True)
            used |= dict.fromkeys(asked - used.keys(), label)
    specialised = [f"{path.parent.name} ({use})" for path, use in used.items() if use in OTHERS]
    if specialised:
        raise RuntimeError(f"kernels that were compiled again for another shape: {', '.join(specialised)}")
    result.write_text(json.dumps({str(path): use for path, use in sorted(used.items())}))


def compile_for(heads: int, key_heads: int, batch: int, length: int, endpoints: int, deterministic: bool) -> None:
    """Plan, forward and backward in bfloat16 for a mask of ``length`` rows and keys."""

    def fake(heads: int) -> torch.Tensor:
        return torch.empty(batch, length, heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")

    mask = IntervalMask(torch.empty(endpoints, length, dtype=torch.int32, device="cuda"), length)
    cudnn_flex.compile_kernels(fake(heads), fake(key_heads), fake(key_heads), mask, deterministic)


def import_package() -> set[Path]:
    """Import the package with its cache on, and stand in for what it asks of a GPU.

    Returns:
        The cached kernels that have been asked for; it grows.
    """
    architecture = os.environ["FLEX_ATTENTION_ARCH"]
    cudnn_cache.enable(architecture)
    from cudnn.flex_attention.plan import builder, validation
    from cudnn.flex_attention.runtime.compile_cache import JITPersistentCache

    number = int(architecture.removeprefix("sm_"))
    validation.get_device_arch = lambda index=None: number
    if torch.version.cuda is None:  # such a PyTorch cannot write into a fake CUDA tensor
        builder._exclusive_offsets = lambda counts: counts.new_empty(counts.numel() + 1)
    asked: set[Path] = set()
    key_to_hash = JITPersistentCache._key_to_hash

    def recorded(cache: Any, key: Any) -> str:
        name: str = key_to_hash(cache, key)
        asked.add(cache.cache_path / f"{name}.o")
        return name

    JITPersistentCache._key_to_hash = recorded
    return asked


if __name__ == "__main__":
    main(Path(sys.argv[1]))
