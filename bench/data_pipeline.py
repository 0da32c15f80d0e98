"""What the data of a run costs: tokens a second of one core, part by part, and whether a step ever waits for them.

``python -m bench.data_pipeline`` packs synthetic corpora (log-normal document lengths, random ids, checked against a
vocabulary) to samples of 4096 tokens and makes micro-batches of them, as a training run does. CPU seconds are counted
for the rates. For the waiting, a consumer asks for the micro-batches of a step, sleeps as long as the step takes on an
accelerator, and asks again: what it waits is what the loader's processes did not hide.

Legend: L tokens of a sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from llada_mega.config.training import ObjectiveConfig, StageConfig
from llada_mega.data.index_file import IndexWriter
from llada_mega.data.indexed import open_corpus
from llada_mega.data.loader import BatchOptions, MicroBatches, micro_batches
from llada_mega.data.order import CurriculumSamples, SampleStream
from llada_mega.data.packing import PackedCorpus
from llada_mega.data.sample import SampleBuilder
from llada_mega.diffusion.corruption import corrupt
from llada_mega.diffusion.curriculum import build_curriculum
from llada_mega.diffusion.noise_levels import draw_noise_levels
from llada_mega.diffusion.schedule import LinearSchedule
from llada_mega.diffusion.visibility import build_visibility

LENGTH, VOCAB_SIZE, MASK_TOKEN = 4096, 150_000, 1
CORPUS_TOKENS = 20_000_000
MEAN_DOCUMENT = (200, 1000, 8000)
BLOCK_SIZES = (1, 32, LENGTH)
STEP_SECONDS, MICRO_BATCHES = 0.4, 8  # 82K tokens a second
PARTS = ("order and packing", "reading", "noise levels and masks", "endpoints", "putting together")
OPTIONS = BatchOptions(seed=1, mask_token_id=MASK_TOKEN, pad_token_id=0)


@dataclass(frozen=True)
class Rate:
    """Medians over samples: CPU milliseconds of a sample by part, and tokens per CPU-second of all."""

    mean_document: int
    documents_per_sample: float
    block_size: int
    milliseconds: dict[str, float]
    tokens_per_cpu_second: float


@dataclass(frozen=True)
class Wait:
    """Milliseconds of wall time that a step of ``step_milliseconds`` waited for its ``micro_batches``, and milliseconds
    of CPU time that they took the training process; the first steps are left out."""

    workers: int
    step_milliseconds: float
    micro_batches: int
    median: float
    largest: float
    cpu: float


def write_corpus(prefix: Path, mean_document: int) -> None:
    """Random token ids in documents whose lengths have a log-normal distribution of shape 1."""
    rng = np.random.default_rng(0)
    count = CORPUS_TOKENS // mean_document
    lengths = np.maximum(1, rng.lognormal(np.log(mean_document) - 0.5, 1.0, count)).astype(np.int64)
    with IndexWriter(prefix, np.dtype(np.int32)) as writer:
        for part in np.array_split(lengths, max(1, count // 1000)):
            writer.add(rng.integers(2, VOCAB_SIZE, int(part.sum()), dtype=np.int32), part)
        writer.finish()


def open_packed(prefix: Path) -> PackedCorpus:
    """The corpus in samples of ``LENGTH``."""
    return PackedCorpus(open_corpus(prefix, vocab_size=VOCAB_SIZE), LENGTH, alignment=32, seed=1)


def samples_of(packed: PackedCorpus, block_size: int) -> CurriculumSamples:
    """One stage of ``block_size`` over the corpus."""
    curriculum = build_curriculum(
        [StageConfig(name="only", block_size=block_size, tokens=packed.num_samples * LENGTH)],
        sequence_length=LENGTH,
        global_batch_size=1,
        base_lr=1e-4,
        min_lr=0.0,
        default_objective=ObjectiveConfig(),
    )
    stage = curriculum.stages[0]
    return CurriculumSamples(curriculum, {(stage.corpora, stage.sequence_length): SampleStream([packed], [1.0])})


def rate(packed: PackedCorpus, block_size: int, mean_document: int, count: int = 100) -> Rate:
    """Times ``count`` samples after ten that are not counted."""
    samples = samples_of(packed, block_size)
    batches, schedule = MicroBatches(samples, OPTIONS), LinearSchedule()
    stage = samples.curriculum.stages[0]
    takes: dict[str, list[float]] = {name: [] for name in (*PARTS, "all")}
    documents = []
    for index in range(count + 10):
        clock = _Clock()
        batches[(index, index, 1)]
        takes["all"].append(clock.lap())
        pieces = packed.pieces(0, index)
        takes["order and packing"].append(clock.lap())
        builder = SampleBuilder(LENGTH)
        for document, start, length in pieces:
            builder.add(packed.corpus.tokens(document, start, length), packed.alignment)
        sample = builder.finish(index)
        takes["reading"].append(clock.lap())
        lengths = sample.document_lengths
        t_L = draw_noise_levels(OPTIONS.seed, index, lengths, block_size, "sequence", 0.0, 1.0)
        corrupt(
            sample.tokens,
            sample.supervised,
            t_L,
            seed=OPTIONS.seed,
            sample_index=index,
            mask_token_id=MASK_TOKEN,
            schedule=schedule,
        )
        takes["noise levels and masks"].append(clock.lap())
        build_visibility(stage.layout, lengths, padding=sample.padding, block_size=block_size)
        takes["endpoints"].append(clock.lap())
        takes["putting together"].append(takes["all"][-1] - sum(takes[name][-1] for name in PARTS[:-1]))
        documents.append(len(lengths) - sum(sample.padding))
    medians = {name: statistics.median(taken[10:]) for name, taken in takes.items()}
    return Rate(
        mean_document=mean_document,
        documents_per_sample=statistics.mean(documents),
        block_size=block_size,
        milliseconds={name: 1e3 * medians[name] for name in PARTS},
        tokens_per_cpu_second=LENGTH / medians["all"],
    )


def wait(packed: PackedCorpus, workers: int, steps: int = 25) -> Wait:
    """What a consumer with steps of ``STEP_SECONDS`` waits; the workers' start is not counted."""
    batches = micro_batches(
        samples_of(packed, 32), OPTIONS, global_batch_size=MICRO_BATCHES, micro_batch_size=1, num_workers=workers
    )
    waited, worked = [], []
    for _ in range(steps + 5):
        start, clock = time.perf_counter(), _Clock()
        next(batches)
        waited.append(1e3 * (time.perf_counter() - start))
        worked.append(1e3 * clock.lap())
        time.sleep(STEP_SECONDS)
    counted = waited[5:]
    return Wait(
        workers,
        1e3 * STEP_SECONDS,
        MICRO_BATCHES,
        statistics.median(counted),
        max(counted),
        statistics.median(worked[5:]),
    )


def measure(say: Callable[[str], None] = print) -> tuple[list[Rate], list[Wait]]:
    """All corpora and block sizes, then the waiting with 0, 1 and 2 processes."""
    rates, waits = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for mean_document in MEAN_DOCUMENT:
            prefix = Path(scratch) / str(mean_document)
            write_corpus(prefix, mean_document)
            packed = open_packed(prefix)
            for block_size in BLOCK_SIZES:
                rates.append(rate(packed, block_size, mean_document))
                say(_line(rates[-1]))
        packed = open_packed(Path(scratch) / str(MEAN_DOCUMENT[0]))
        for workers in (0, 1, 2):
            waits.append(wait(packed, workers))
            found = waits[-1]
            say(
                f"data.num_workers={workers}: a step of {found.step_milliseconds:.0f} ms and {found.micro_batches} "
                f"micro-batches waits {found.median:.1f} ms, at most {found.largest:.1f} ms; {found.cpu:.1f} ms of CPU"
            )
    return rates, waits


class _Clock:
    """CPU seconds of this process since the last lap."""

    def __init__(self) -> None:
        self._last = time.process_time()

    def lap(self) -> float:
        now = time.process_time()
        passed, self._last = now - self._last, now
        return passed


def _line(found: Rate) -> str:
    parts = ", ".join(f"{name} {value:.2f}" for name, value in found.milliseconds.items())
    return (
        f"{found.documents_per_sample:5.1f} documents a sample, block {found.block_size:4}: "
        f"{found.tokens_per_cpu_second / 1e3:6.0f}K tokens/CPU-second (ms: {parts})"
    )


def main() -> None:
    """Print the rates; write them as JSON with ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates, waits = measure()
    if options.output is not None:
        content = {"rates": [asdict(r) for r in rates], "waits": [asdict(w) for w in waits]}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
