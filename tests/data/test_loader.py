"""Data, noise and masks are the same for every split of the work: by checksum."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llada_mega.config.data import Corpus, DataConfig
from llada_mega.config.training import ObjectiveConfig, StageConfig, StageObjectiveConfig
from llada_mega.data import loader
from llada_mega.data.batch import Batch
from llada_mega.data.indexed import IndexedCorpus
from llada_mega.data.loader import BatchOptions, micro_batches
from llada_mega.data.order import CurriculumSamples, RunCorpora
from llada_mega.diffusion.curriculum import build_curriculum
from llada_mega.errors import ConfigError, DataError

GLOBAL_BATCH = 8
LENGTH = 32
OPTIONS = BatchOptions(seed=17, mask_token_id=99_999, pad_token_id=0, length_multiple=64, row_multiple=16)


@pytest.fixture
def samples(write_corpus: Callable[..., IndexedCorpus]) -> CurriculumSamples:
    lengths = np.random.default_rng(0).integers(1, 70, 60).tolist()
    corpora = [
        Corpus(str(write_corpus(lengths, "a").prefix), 3.0),
        Corpus(str(write_corpus([50] * 9, "b").prefix), 1.0),
    ]
    tokens = 2 * GLOBAL_BATCH * LENGTH
    stages = [
        StageConfig(block_size=1, tokens=tokens),
        StageConfig(block_size=8, tokens=tokens, objective=StageObjectiveConfig(weighting="uniform", level="block")),
        StageConfig(block_size=32, tokens=tokens, data=corpora[1:]),
        StageConfig(block_size=16, tokens=tokens, sequence_length=48),
    ]
    curriculum = build_curriculum(
        stages,
        sequence_length=LENGTH,
        global_batch_size=GLOBAL_BATCH,
        base_lr=1e-3,
        min_lr=0.0,
        default_objective=ObjectiveConfig(),
    )
    config = DataConfig(sequence_length=LENGTH, train=corpora, document_alignment=8)
    return RunCorpora(config, seed=17).training_samples(curriculum)


def steps_of(samples: CurriculumSamples, *, ranks: int = 1, micro_batch: int = 2, **options: Any) -> list[list[Batch]]:
    """Micro-batches of every step, those of all ranks together."""
    loaders = [
        micro_batches(
            samples,
            OPTIONS,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=micro_batch,
            rank=rank,
            world_size=ranks,
            **options,
        )
        for rank in range(ranks)
    ]
    return [[batch for part in step for batch in part] for step in zip(*loaders, strict=True)]


def checksum(batches: Iterable[Batch]) -> str:
    """Of the tokens to predict, their keys, noise levels, weights and what their attention rows see."""
    rows = []
    denominator = 0
    for batch in batches:
        n = batch.num_rows
        denominator += batch.denominator
        seen = batch.mask.visible_counts()[batch.logit_rows_R[:n]]
        columns = [batch.row_sample_R, batch.row_position_R, batch.labels_R, batch.weights_R, batch.noise_levels_R]
        position = batch.position_ids_S[batch.logit_rows_R[:n]]
        rows.append(torch.stack([*(c[:n].double() for c in columns), seen.double(), position.double()], dim=1))
    table = torch.cat(rows)
    table = table[np.lexsort((table[:, 1].numpy(), table[:, 0].numpy()))]
    return hashlib.sha256(table.numpy().tobytes() + str(denominator).encode()).hexdigest()


def checksums(steps: list[list[Batch]]) -> list[str]:
    return [checksum(step) for step in steps]


def test_checksums_do_not_depend_on_the_split(samples: CurriculumSamples) -> None:
    reference = checksums(steps_of(samples))
    assert len(reference) == 8 == len(set(reference))
    for micro_batch in (1, 4, 8):
        assert checksums(steps_of(samples, micro_batch=micro_batch)) == reference
    for ranks in (2, 4):
        assert checksums(steps_of(samples, ranks=ranks, micro_batch=1)) == reference
    for num_workers in (1, 2):
        assert checksums(steps_of(samples, num_workers=num_workers)) == reference
    for step in range(8):
        restarted = steps_of(samples, start_sample=step * GLOBAL_BATCH, num_workers=step % 2)
        assert checksums(restarted) == reference[step:]


def test_batches_are_equal_bit_for_bit_across_workers(samples: CurriculumSamples) -> None:
    for here, there in zip(steps_of(samples), steps_of(samples, num_workers=2), strict=True):
        for one, two in zip(here, there, strict=True):
            for name, value in vars(one).items():
                other = getattr(two, name)
                if torch.is_tensor(value):
                    assert torch.equal(value, other), name
                elif name == "mask":
                    assert torch.equal(value.endpoints, other.endpoints) and value.total_k == other.total_k
                else:
                    assert value == other, name


def test_a_restart_anywhere_gives_the_same_samples(samples: CurriculumSamples) -> None:
    """Also between global batches, as after a change of the batch size."""
    expected = {index: samples[index].tokens.tolist() for index in range(5, 40)}
    for step in steps_of(samples, start_sample=5, micro_batch=4, end_sample=30):
        for batch in step:
            for index in batch.row_sample_R[: batch.num_rows].unique().tolist():
                of_sample = batch.row_sample_R[: batch.num_rows] == index
                positions = batch.row_position_R[: batch.num_rows][of_sample].tolist()
                labels = batch.labels_R[: batch.num_rows][of_sample].tolist()
                assert labels == [expected[index][position] for position in positions]


def test_ranks_take_contiguous_slices(samples: CurriculumSamples) -> None:
    steps = [
        next(
            micro_batches(samples, OPTIONS, global_batch_size=GLOBAL_BATCH, micro_batch_size=2, rank=rank, world_size=2)
        )
        for rank in range(2)
    ]
    taken = [[set(batch.row_sample_R[: batch.num_rows].tolist()) for batch in step] for step in steps]
    assert all(set() < numbers <= allowed for numbers, allowed in zip(taken[0], [{0, 1}, {2, 3}], strict=True))
    assert all(set() < numbers <= allowed for numbers, allowed in zip(taken[1], [{4, 5}, {6, 7}], strict=True))


def test_batches_follow_the_stages(samples: CurriculumSamples) -> None:
    steps = steps_of(samples)
    told = [(step[0].stage_index, step[0].block_size, step[0].layout, step[0].consumed_samples) for step in steps]
    assert told == [
        (0, 1, "bdlm", 0),
        (0, 1, "bdlm", 8),
        (1, 8, "bdlm", 16),
        (1, 8, "bdlm", 24),
        (2, 32, "mdlm", 32),
        (2, 32, "mdlm", 40),
        (3, 16, "bdlm", 48),
        (3, 16, "bdlm", 56),
    ]
    uniform = steps[2][0]
    assert uniform.denominator == uniform.num_rows
    assert uniform.noise_levels_R[: uniform.num_rows].unique().numel() > 2  # one level a block
    assert steps[0][0].denominator == steps[0][0].num_tokens
    assert len(steps[4][0].input_ids_S) == 64  # two samples without a clean half


def test_global_generator_is_left_alone(samples: CurriculumSamples) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    steps_of(samples, end_sample=8)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_corpus_ends_in_one_line(samples: CurriculumSamples, num_workers: int) -> None:
    for stream in samples.streams.values():
        for packed in stream.corpora:
            packed.corpus.check_vocabulary(50)
    with pytest.raises(DataError, match="outside the vocabulary of 50") as caught:
        steps_of(samples, num_workers=num_workers)
    assert "\n" not in str(caught.value)


def test_a_dead_worker_ends_in_one_line(samples: CurriculumSamples) -> None:
    steps = micro_batches(
        samples, OPTIONS, global_batch_size=GLOBAL_BATCH, micro_batch_size=1, num_workers=1, prefetch_factor=1
    )
    next(steps)
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(DataError, match=r"a data worker died, .*data\.num_workers") as caught:
        for _ in steps:
            pass
    assert "\n" not in str(caught.value)


def open_files() -> int:
    """Descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_whole_step_is_built_ahead_and_takes_no_descriptors(samples: CurriculumSamples) -> None:
    """A step may have hundreds of micro-batches, a process often no more than 1024 files."""
    steps = micro_batches(samples, OPTIONS, global_batch_size=GLOBAL_BATCH, micro_batch_size=1, num_workers=1)
    first = next(steps)
    before = open_files()
    kept = [*first, *next(steps), *next(steps)]
    assert len(kept) == 3 * GLOBAL_BATCH
    assert open_files() == before


@pytest.mark.parametrize(("num_workers", "micro_batch", "expected"), [(0, 1, None), (1, 1, 8), (3, 1, 3), (2, 4, 2)])
def test_what_is_asked_of_the_loader(
    samples: CurriculumSamples,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    micro_batch: int,
    expected: int | None,
) -> None:
    """Together the workers have a step ready; with a GPU, in page-locked memory."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(loader, "DataLoader", lambda *_, **options: asked.append(options))
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        micro_batches(
            samples, OPTIONS, global_batch_size=GLOBAL_BATCH, micro_batch_size=micro_batch, num_workers=num_workers
        )
    assert [options["pin_memory"] for options in asked] == [False, True]
    assert [options["prefetch_factor"] for options in asked] == [expected, expected]


def test_uneven_splits_are_refused(samples: CurriculumSamples) -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size=8 is not a multiple .*=3 times .* size 2; use 12"):
        micro_batches(samples, OPTIONS, global_batch_size=8, micro_batch_size=3, world_size=2)
