"""``python -m bench.loss_compare``: does the code still make the loss curves that are kept in ``tests/golden``?

Both runs of :mod:`bench.loss_runs` are trained again and compared step by step. Within the tolerance they differ by how
a CPU adds up; beyond it somebody changed what is computed. When that was meant, ``--update --reason "..."`` writes the
new curves and appends the reason to the file's history. Every entry of it has the digest of the curves that it brought,
so a file that was edited by hand is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench.loss_runs import METRICS, RUNS, Curves, LossRun, train

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
# Relative, for every value of every step. Other instruction sets, thread counts and versions of PyTorch and
# Megatron-Core make at most a fortieth of it. What it catches, and a change that the dense run alone would miss, is in
# docs/benchmarks.md.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of one curve, and the first step (from 1) outside the tolerance, if any."""

    metric: str
    largest: float
    at_step: int
    first_outside: int | None


class GoldenError(Exception):
    """A kept curve that cannot be trusted; the message says what to do."""


def golden_path(run: LossRun) -> Path:
    """Where the curves of ``run`` are kept."""
    return GOLDEN / f"{run.name}.json"


def read_golden(path: Path) -> dict[str, Any]:
    """The kept curves with their header and history.

    Raises:
        GoldenError: the curves are not those of the last entry of the history.
    """
    golden = json.loads(path.read_text("utf-8"))
    if not golden["history"] or golden["history"][-1]["sha256"] != digest(golden["curves"]):
        raise GoldenError(
            f"{path} was changed by hand: its curves are not those of the last reason in its history; "
            "take it back from git, then use --update"
        )
    return golden


def differences(curves: Curves, golden: Curves) -> list[Difference]:
    """One of each metric. Curves of another length differ everywhere."""
    found = []
    for metric in METRICS:
        relative = relative_differences(curves[metric], golden[metric])
        outside = np.flatnonzero(~(relative <= TOLERANCE))  # NaN is outside
        worst = int(np.argmax(np.nan_to_num(relative, nan=np.inf)))
        first = int(outside[0]) + 1 if len(outside) else None
        found.append(Difference(metric, float(relative[worst]), worst + 1, first))
    return found


def relative_differences(curve: list[float], golden: list[float]) -> np.ndarray:
    """|a - b| / |b| of every step: float64 [steps]."""
    ours, kept = np.asarray(curve, dtype=np.float64), np.asarray(golden, dtype=np.float64)
    return np.abs(ours - kept) / np.abs(kept) if len(ours) == len(kept) else np.full(len(kept), np.inf)


def updated(golden: dict[str, Any] | None, run: LossRun, curves: Curves, reason: str) -> dict[str, Any]:
    """The file's new content: header of this machine, one more reason, the new curves."""
    entry: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "reason": reason, "sha256": digest(curves)}
    if golden is not None:
        entry["largest_change"] = {d.metric: d.largest for d in differences(curves, golden["curves"])}
    return {
        "command": " ".join(["llada-mega train", *(f"'{override}'" for override in run.overrides())]),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "megatron-core")},
        },
        "machine": platform.machine(),
        "history": [*(golden["history"] if golden else []), entry],
        "curves": curves,
    }


def digest(curves: Curves) -> str:
    """SHA-256 of the curves, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(curves, sort_keys=True).encode()).hexdigest()


def table(found: dict[str, list[Difference]]) -> str:
    """A line a curve."""
    lines = [f"{'run':8}{'curve':12}{'largest difference':>20}{'at step':>9}{'tolerance':>11}  verdict"]
    for name, of_run in found.items():
        for d in of_run:
            verdict = "ok" if d.first_outside is None else f"differs from step {d.first_outside} on"
            lines.append(f"{name:8}{d.metric:12}{d.largest:20.1e}{d.at_step:9}{TOLERANCE:11.0e}  {verdict}")
    return "\n".join(lines)


def main() -> int:
    """0 when every curve is within the tolerance, or was updated; 1 when one is not; 2 for a wrong call."""
    options = _options()
    if options.update != bool(options.reason):
        print('error: a numeric change must say why: --update --reason "what changed, and why it is right"',
              file=sys.stderr)  # fmt: skip
        return 2
    found: dict[str, list[Difference]] = {}
    drawn: dict[str, tuple[Curves, Curves]] = {}
    for run in RUNS:
        with tempfile.TemporaryDirectory() as scratch:
            curves = train(run, Path(scratch))
        path = golden_path(run)
        try:
            golden = read_golden(path) if path.exists() else None
        except GoldenError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        if golden is not None:
            found[run.name] = differences(curves, golden["curves"])
            drawn[run.name] = curves, golden["curves"]
        changed = golden is None or any(d.first_outside is not None for d in found[run.name])
        if options.update and changed:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(updated(golden, run, curves, options.reason), indent=1) + "\n", "utf-8")
            print(f"wrote {path}")
        elif golden is None:
            print(f'error: {path} is missing; make it with --update --reason "..."', file=sys.stderr)
            return 1
    print(table(found))
    if options.plot is not None:
        from bench.loss_figure import write_figure  # matplotlib takes a second to import

        options.plot.parent.mkdir(parents=True, exist_ok=True)
        write_figure(drawn, TOLERANCE, options.plot)
        print(f"drew {options.plot}")
    outside = any(d.first_outside is not None for of_run in found.values() for d in of_run)
    if outside and not options.update:
        print("a change that was meant: make loss-compare ARGS='--update --reason \"...\"'")
    return int(outside and not options.update)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.loss_compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="keep the new curves of runs that differ")
    parser.add_argument("--reason", default="", help="why the numbers changed; goes into the history")
    parser.add_argument("--plot", type=Path, default=Path("build/bench/loss_compare.png"), help="where to draw them")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
