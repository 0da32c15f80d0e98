"""``python -m llada_kernels.bench [--quick] [--lengths 1024 4096] [--output DIR]``: table, JSON and plot."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llada_kernels.attention import choose_backend
from llada_kernels.bench.cases import LENGTHS, Shape, all_cases, quick_cases
from llada_kernels.bench.measure import DENSE, Measurement, gemm_flops_per_second, measure

HEADER = (
    f"{'case':<36} {'live':>6} {'candidate':<11} {'ms':>9} {'floor ms':>9} "
    f"{'of floor':>8} {'dense/this':>10} {'peak MiB':>9} {'error':>8}"
)


def main() -> None:
    """Prints one row a case and candidate as it is measured, then writes ``kernels.json`` and ``kernels.png``."""
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = Shape.on(device)
    speed = gemm_flops_per_second(device, shape.dtype)
    environment = _environment(device, shape, speed)
    print("\n".join(f"{key}: {value}" for key, value in environment.items()))
    print(HEADER)
    results: list[Measurement] = []
    for case in quick_cases() if options.quick else all_cases(tuple(options.lengths)):
        for result in measure(case, shape, device, speed):
            print(_row(result), flush=True)
            results.append(result)
    options.output.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment, "results": [asdict(result) for result in results]}
    (options.output / "kernels.json").write_text(json.dumps(record, indent=1) + "\n")
    _plot(results, environment, options.output / "kernels.png")
    print(f"wrote {options.output}/kernels.json and kernels.png")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llada_kernels.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="five cases, about a minute on a CPU")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens L (the mask has 2L rows)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="where the JSON and the plot go")
    return parser.parse_args()


def _environment(device: torch.device, shape: Shape, speed: float) -> dict[str, Any]:
    backend, reason = choose_backend("auto", device, shape.dtype, shape.head_dim)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "attention": f"{shape.query_heads} query heads, {shape.key_heads} key heads of {shape.head_dim}, "
        f"{str(shape.dtype).removeprefix('torch.')}, forward and backward",
        "auto": f"{backend}: {reason}",
        "matrix products": f"{speed / 1e9:.0f} GFLOP/s",
    }


def _row(result: Measurement) -> str:
    ratio = "" if result.dense_ratio is None else f"{result.dense_ratio:.2f}"
    return (
        f"{result.case:<36} {result.live_share:>6.1%} {result.candidate:<11} {result.milliseconds:>9.2f} "
        f"{result.floor_milliseconds:>9.2f} {result.floor_milliseconds / result.milliseconds:>8.0%} {ratio:>10} "
        f"{result.peak_mib:>9.1f} {result.max_error:>8.0e}"
    )


def _plot(results: list[Measurement], environment: dict[str, Any], path: Path) -> None:
    """Milliseconds of every candidate, and the floor, case by case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(result.case for result in results))
    names = [DENSE, *dict.fromkeys(result.candidate for result in results if result.candidate != DENSE)]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.32 * len(cases)), layout="constrained")
    for name in names:
        points = [(cases.index(r.case), r.milliseconds) for r in results if r.candidate == name]
        if points:
            axes.plot([ms for _, ms in points], [row for row, _ in points], "o", label=name)
    floor = {result.case: result.floor_milliseconds for result in results}
    axes.plot([floor[case] for case in cases], range(len(cases)), "k|", markersize=9, label="floor")
    axes.set(xscale="log", xlabel="milliseconds, forward + backward", yticks=range(len(cases)), yticklabels=cases)
    axes.set_title(
        f"Block attention, {environment['device']}, {environment['threads']} threads\n{environment['attention']}"
    )
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
