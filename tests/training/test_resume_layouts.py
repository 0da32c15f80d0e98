"""A run goes on from its checkpoint under any layout as it would have gone on where it was, optimizer included.

Two steps, a checkpoint, three more steps. Under the same layout the resumed run is the uninterrupted one bit for bit.
From one process into every layout, from every layout into one process, and between layouts drawn at random it is the
same up to rounding. It is compared with the uninterrupted run of the layout that saved: that one begins the three steps
with the very same numbers, so nothing but the move is measured, and it is there anyway.

Everything goes through ``run_training``, with AdamW. `make test` runs a few moves, `make test-full` all.
"""

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from rich.console import Console
from torch import Tensor

from llada_mega.checkpoint.checkpoint import read_state, step_name
from llada_mega.checkpoint.storage import ShardReader
from llada_mega.config.compose import compose
from llada_mega.config.run import ParallelConfig
from llada_mega.config.schema import Config
from llada_mega.config.validate import validate
from llada_mega.training import run
from llada_mega.training.resume import sharded_training_state
from tests.parallel import test_matrix
from tests.parallel.harness import run_ranks
from tests.parallel.matrix_worker import MODELS, watch_routers
from tests.training.rows import read_rows, untimed_state

pytestmark = [pytest.mark.slow]

SAVED, LAST = 2, 5  # steps
LENGTH = 16
TOLERANCE = 1e-5
# With this seed no routing decision is nearer to a tie, in either MoE run; rounding moves a score by some 1e-7.
SEED, TIE = 8, 1e-4

# The layouts of the matrix, (model, processes, layout), and each model on one process.
ALONE = {model: f"{model}, one process" for model in MODELS}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{name: (model, 1, {}) for model, name in ALONE.items()},
    **test_matrix.LAYOUTS,
}
# What `make test` runs.
FAST_SAME = {"moe-ep2-distributed", "moe-pp2-vp2"}
FAST_MOVES = {
    (ALONE["moe"], "moe-ep2-distributed"),
    ("moe-pp2-vp2", ALONE["moe"]),
    ("moe-ep2", "moe-tp2-ep2"),  # drawn
    (ALONE["dense"], "dense-tp2-without-sp"),
}


# ---- runs ------------------------------------------------------------------------------------------------------------


def train_on_this_rank(config: Config) -> None:
    run.run_training(config, Console(quiet=True))


@dataclass(frozen=True)
class Run:
    """A finished run."""

    directory: Path

    def checkpoint(self, step: int) -> Path:
        return self.directory / "checkpoints" / step_name(step)

    def rows(self) -> list[dict[str, Any]]:
        """Metrics of the steps after the first checkpoint, without timings."""
        rows = read_rows(self.directory)
        return [rows[step] for step in range(SAVED + 1, LAST + 1)]

    def checksums(self) -> list[str]:
        """Every rank's index of the last checkpoint: names, places and checksum of its weights and moments."""
        return [path.read_text() for path in sorted(self.checkpoint(LAST).glob("tensors/*.json"))]


class Runs:
    """The runs of a test session: each is made once, by whichever of pytest's workers asks first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.corpus = self._once("corpus", write_corpus) / "tokens"

    def uninterrupted(self, layout: str) -> Run:
        """Five steps under one layout, with a checkpoint after two."""
        return self._train(layout, layout, "checkpoint.every=2", "checkpoint.keep_last=3")

    def resumed(self, saved: str, layout: str) -> Run:
        """The last three of them under ``layout``, from the checkpoint of ``saved``."""
        return self._train(f"{saved} into {layout}", layout, self.resume_from(saved))

    def resume_from(self, saved: str) -> str:
        return f"checkpoint.resume='{self.uninterrupted(saved).checkpoint(SAVED)}'"

    def configuration(self, directory: Path, layout: str, *overrides: str) -> Config:
        """Samples of several documents; blocks of 4, of 8, and none; embedding noise reaches beyond the checkpoint."""
        model, world_size, parallel = LAYOUTS[layout]
        common = [
            f"seed={SEED}",
            f"run.dir='{directory}'",
            f"data.train=[{{path: {self.corpus}}}]",
            f"data.sequence_length={LENGTH}",
            "data.document_alignment=4",
            f"data.clean_tokens={'all' if model.endswith('all clean tokens') else 'needed'}",
            "curriculum.stages=[{name: four, block_size: 4, tokens: 192, embedding_noise: {decay_tokens: 192}},"
            "{name: eight, block_size: 8, tokens: 64}, {name: whole, block_size: 16, tokens: 64}]",
            "trainer.global_batch_size=4",
            "trainer.consistency_every=1",
            "optimizer.lr=1e-3",
        ]
        config = compose(Config, [*common, *overrides])
        config.model, config.parallel = MODELS[model], ParallelConfig(**parallel)
        validate(config, world_size)
        return config

    def _train(self, name: str, layout: str, *overrides: str) -> Run:
        def train(directory: Path) -> None:
            config = self.configuration(directory, layout, *overrides)
            run_ranks(train_on_this_rank, LAYOUTS[layout][1], config=config)

        return Run(self._once(name, train))

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        directory = self.root / name.replace(" ", "_").replace(",", "")
        directory.mkdir(parents=True, exist_ok=True)
        with directory.with_suffix(".lock").open("w") as lock:  # the run has RUN/lock
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (directory / "done").exists():
                make(directory)
                (directory / "done").touch()
        return directory


def write_corpus(directory: Path) -> None:
    """Documents of 3 to 16 tokens with learnable structure, without MASK."""
    builder = IndexedDatasetBuilder(str(directory / "tokens.bin"), dtype=np.int32)
    rng = np.random.default_rng(0)
    for length in rng.integers(3, LENGTH + 1, 100):
        builder.add_document(torch.tensor(4 + np.cumsum(rng.integers(0, 3, length)) % 140), [length])
    builder.finalize(str(directory / "tokens.idx"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.getbasetemp()
    return Runs((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "resume_layouts")


# ---- comparing -------------------------------------------------------------------------------------------------------


def differences(run: Run, reference: Run) -> dict[str, tuple[float, str]]:
    """The largest relative difference of losses, norms, final weights and moments, and where it is."""
    worst: dict[str, tuple[float, str]] = {}

    def see(kind: str, difference: float, where: str) -> None:
        worst[kind] = max(worst.get(kind, (0.0, "")), (difference, where))

    for row, expected in zip(run.rows(), reference.rows(), strict=True):
        for kind in ("loss", "grad_norm"):
            see(kind, abs(row[kind] / expected[kind] - 1), f"step {row['step']}")
    ours, theirs = (ShardReader(end.checkpoint(LAST)) for end in (run, reference))
    assert ours.index.keys() == theirs.index.keys()
    for key in ours.index:
        kind = key.split(".")[2] if key.startswith("optimizer.") else "weight"
        see(kind, relative_difference(ours.read_whole(key), theirs.read_whole(key)), key)
    assert worst.keys() == {"loss", "grad_norm", "weight", "exp_avg", "exp_avg_sq"}
    return worst


def relative_difference(tensor: Tensor, expected: Tensor) -> float:
    """Of a tensor's largest element; tables are padded to more rows under tensor parallelism."""
    rows = min(len(tensor), len(expected))
    return float((tensor[:rows] - expected[:rows]).abs().max() / expected.abs().max().clamp(min=1e-30))


# ---- tests -----------------------------------------------------------------------------------------------------------


def drawn_pairs(number: int) -> list[tuple[str, str]]:
    """Different layouts of one model."""
    names = test_matrix.LAYOUTS
    pairs = [(a, b) for a in names for b in names if a != b and names[a][0] == names[b][0]]
    return random.Random(0).sample(pairs, number)


def moves() -> list[Any]:
    """(layout that saves, layout that resumes); all but the fast ones are marked ``full``."""
    found = []
    for name, (model, _, _) in test_matrix.LAYOUTS.items():
        found += [(ALONE[model], name), (name, ALONE[model])]
    found += drawn_pairs(8)
    return [
        pytest.param(*move, marks=[] if move in FAST_MOVES else [pytest.mark.full], id=" into ".join(move))
        for move in found
    ]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in FAST_SAME else [pytest.mark.full]) for name in LAYOUTS]
)
def test_the_same_layout_resumes_bit_for_bit(runs: Runs, layout: str) -> None:
    resumed, whole = runs.resumed(layout, layout), runs.uninterrupted(layout)
    assert resumed.rows() == whole.rows()
    assert resumed.checksums() == whole.checksums() != []
    assert untimed_state(resumed.checkpoint(LAST)) == untimed_state(whole.checkpoint(LAST))


@pytest.mark.parametrize(("saved", "layout"), moves())
def test_a_moved_run_goes_on_as_if_it_had_stayed(runs: Runs, saved: str, layout: str) -> None:
    moved, stayed = runs.resumed(saved, layout), runs.uninterrupted(saved)
    found = differences(moved, stayed)
    assert all(difference <= TOLERANCE for difference, _ in found.values()), found
    for key in ("optimizer", "train"):
        assert read_state(moved.checkpoint(LAST))[key] == read_state(stayed.checkpoint(LAST))[key]


def train_without_moments(config: Config) -> None:
    """A resume that loses AdamW's moments, but not its count of steps."""
    restore = run.restore

    def restore_and_lose(step: Any, *arguments: Any) -> Any:
        state = restore(step, *arguments)
        for moment in sharded_training_state(step)["optimizer"].values():
            moment.data.zero_()
        return state

    with mock.patch.object(run, "restore", restore_and_lose):
        train_on_this_rank(config)


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_lost_moments_would_be_seen(runs: Runs, tmp_path: Path, model: str) -> None:
    """The first step does not need them yet; after that they show in everything that is compared."""
    one = ALONE[model]
    run_ranks(train_without_moments, 1, config=runs.configuration(tmp_path, one, runs.resume_from(one)))
    forgetful, whole = Run(tmp_path), runs.uninterrupted(one)
    assert forgetful.rows()[0] == whole.rows()[0]
    found = differences(forgetful, whole)
    assert all(difference > 10 * TOLERANCE for difference, _ in found.values()), found


def smallest_margin(config: Config) -> float:
    """Train; how near a routing decision of this rank came to another one."""
    build, margins = run.build_step, list[list[float]]()

    def build_step(*arguments: Any, **keywords: Any) -> Any:
        step = build(*arguments, **keywords)
        margins.append(watch_routers(step.bare_models))
        return step

    with mock.patch.object(run, "build_step", build_step):
        train_on_this_rank(config)
    return min(margins[0])


@pytest.mark.parametrize("model", ["moe", "moe with all clean tokens"])
def test_no_routing_decision_is_near_a_tie(runs: Runs, tmp_path: Path, model: str) -> None:
    """Otherwise rounding could choose another expert, and no bound could be asked."""
    (margin,) = run_ranks(smallest_margin, 1, config=runs.configuration(tmp_path, ALONE[model]))
    assert margin >= TIE
