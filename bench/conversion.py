"""Memory and time of conversion on a checkpoint of Ling-flash widths: ``make bench-conversion``.

A random checkpoint with all experts and as many layers as are asked for is written, imported, deleted, exported, and
compared with what was written, tensor by tensor. Each conversion is a process of its own, whose peak resident memory
(mapped files included) is what the operating system says. Memory must not grow with layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from safetensors import safe_open
from torch import Tensor

from llada_mega.checkpoint.directory import NewDirectory
from llada_mega.checkpoint.hf import plan_weights, seal_hf
from llada_mega.checkpoint.hf_config import render_config
from llada_mega.checkpoint.streaming import write_files
from llada_mega.checkpoint.weights import stored_dtype
from llada_mega.config.compose import compose
from llada_mega.config.model import ModelConfig
from llada_mega.config.schema import Config
from llada_mega.models.hf_mapping import hf_shapes
from llada_mega.parallel.workers import ALONE

GIB = 2**30


@dataclass
class Measurement:
    """One conversion."""

    conversion: str
    layers: int
    gib: float
    seconds: float
    peak_gib: float


def main() -> int:
    """Print the table; write it as JSON with ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3], help="the first one is dense")
    parser.add_argument("--stacked", action="store_true", help="export with stacked experts, and back")
    parser.add_argument("--folder", type=Path, help="where about 2.5 times the largest checkpoint has room")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    flash = compose(Config, ["experiment=cpt_100b"]).model
    found: list[Measurement] = []
    for layers in options.layers:
        model = dataclasses.replace(flash, num_layers=layers)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found += run(model, Path(folder), options.stacked)
    print(f"\n{'conversion':10} {'layers':>6} {'GiB':>6} {'seconds':>8} {'GiB/s':>6} {'peak GiB':>9}")
    for row in found:
        rate = row.gib / row.seconds
        print(f"{row.conversion:10} {row.layers:6} {row.gib:6.1f} {row.seconds:8.0f} {rate:6.2f} {row.peak_gib:9.2f}")
    if options.output:
        options.output.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")
    return 0


def run(model: ModelConfig, folder: Path, stacked: bool) -> list[Measurement]:
    """Import and export one checkpoint. Raises AssertionError when a tensor comes back changed."""
    source, checkpoint, exported = folder / "in", folder / "checkpoint", folder / "out"
    digests, size = write_random(model, source)
    print(f"{model.num_layers} layers, {len(digests)} tensors, {size / GIB:.1f} GiB", flush=True)
    found = [measure("import", model.num_layers, size, [f"hf={source}", f"output={checkpoint}"])]
    shutil.rmtree(source)
    options = [f"checkpoint={checkpoint}", f"output={exported}"]
    if stacked:
        found.append(measure("export", model.num_layers, size, [*options, "experts=stacked"], "stacked"))
        shutil.rmtree(checkpoint)
        found.append(measure("import", model.num_layers, size, [f"hf={exported}", f"output={checkpoint}"], "unstacked"))
        shutil.rmtree(exported)
    found.append(measure("export", model.num_layers, size, options))
    shutil.rmtree(checkpoint)
    assert read_digests(exported) == digests, "a tensor came back changed"
    print("every tensor came back bit for bit", flush=True)
    return found


def write_random(model: ModelConfig, directory: Path) -> tuple[dict[str, str], int]:
    """A Hugging Face directory with random weights; SHA-256 of every tensor, and bytes of all."""
    digests: dict[str, str] = {}
    random = numpy.random.default_rng(0)
    shapes = hf_shapes(model)

    def make(name: str) -> Iterator[Tensor]:
        # values between -2 and 2: no infinities, which would still be copied, but look like an error
        values = torch.from_numpy(random.integers(0, 2**14, size=torch.Size(shapes[name]).numel(), dtype=numpy.int16))
        tensor = values.view(torch.bfloat16).to(stored_dtype(name, torch.bfloat16)).reshape(shapes[name])
        digests[name] = digest(tensor)
        yield tensor

    new = NewDirectory(directory)
    new.start()
    files = plan_weights(
        new.partial, model, make, dtype=torch.bfloat16, max_shard_size=4 * 10**9, stacked_experts=False
    )
    write_files(files, ALONE)
    content = render_config(model, torch.bfloat16, None)
    seal_hf(new, files, model, content, {}, {})
    return digests, sum(file.nbytes for file in files)


def measure(command: str, layers: int, size: int, arguments: list[str], label: str | None = None) -> Measurement:
    """Run a conversion in a process of its own. Raises CalledProcessError."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "llada_mega", "convert", command, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    seconds = time.perf_counter() - began
    return Measurement(label or command, layers, size / GIB, seconds, usage.ru_maxrss / 2**20)


def read_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a Hugging Face directory."""
    found: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return found


def digest(tensor: Tensor) -> str:
    """SHA-256 of the values."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
