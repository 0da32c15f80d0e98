"""What AdamW costs on a CPU in each of PyTorch's three implementations, and how far they are apart.

``python -m bench.optimizer_step`` steps parameters of the shapes of a dense model, the same gradients for all. A step
reads weight, gradient and two moments and writes three of them; the rate is that traffic over the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

IMPLEMENTATIONS = {
    "a loop over tensors": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
# An embedding and ten layers of SmolLM2-135M: 64 million parameters.
SHAPES = [(49153, 576), *10 * [(576,), (960, 576), (576, 576), (576,), (3072, 576), (576, 1536)]]
BYTES_MOVED = 7 * 4  # of a parameter: four float32 read, three written


@dataclass(frozen=True)
class OptimizerCost:
    """Seconds of CPU time a step, medians; the largest difference from the loop's weights over all steps."""

    parameters: int
    seconds: dict[str, float]
    difference: dict[str, float]


def measure(repeats: int = 9) -> OptimizerCost:
    """Alternate the implementations, each on weights of its own."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in SHAPES]
    weights, optimizers = {}, {}
    for name, choice in IMPLEMENTATIONS.items():
        weights[name] = [torch.zeros_like(g).fill_(0.02).requires_grad_() for g in gradients]
        for weight, gradient in zip(weights[name], gradients, strict=True):
            weight.grad = gradient
        optimizers[name] = torch.optim.AdamW(weights[name], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, **choice)
    takes: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(repeats + 1):
        for name, optimizer in optimizers.items():
            start = time.process_time()
            optimizer.step()
            takes[name].append(time.process_time() - start)
    first, *others = weights
    parameters = sum(g.numel() for g in gradients)
    return OptimizerCost(
        parameters=parameters,
        seconds={name: statistics.median(taken[1:]) for name, taken in takes.items()},
        difference={name: _difference(weights[name], weights[first]) for name in others},
    )


def text(result: OptimizerCost) -> str:
    """The result in lines."""
    lines = [f"AdamW, {result.parameters / 1e6:.0f} million float32 parameters, CPU seconds a step"]
    for name, seconds in result.seconds.items():
        apart = f", weights differ by {result.difference[name]:.0e} at most" if name in result.difference else ""
        rate = result.parameters * BYTES_MOVED / seconds / 2**30
        lines.append(f"  {name:20}{seconds:8.3f} s, {rate:.0f} GiB/s{apart}")
    return "\n".join(lines)


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    """Print the result; write it as JSON with ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result = measure()
    print(text(result))
    if options.output is not None:
        options.output.write_text(json.dumps(asdict(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
