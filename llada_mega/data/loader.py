"""Global micro-batches in order, built ahead by worker processes.

Of the global batch of samples [c, c + G), data-parallel rank r of n takes the contiguous slice
[c + r G/n, c + (r + 1) G/n), in micro-batches of consecutive samples. Batches are built from sample numbers alone, so
the number of workers, the split into micro-batches and ranks, and the place of a restart change no sample, no mask and
no noise level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from llada_mega.data.batch import Batch, build_batch
from llada_mega.data.order import CurriculumSamples
from llada_mega.data.sample import Sample
from llada_mega.diffusion.schedule import get_schedule
from llada_mega.diffusion.stages import ResolvedStage
from llada_mega.errors import ConfigError, DataError, LladaMegaError
from llada_mega.ranks import signals_held_back


@dataclass(frozen=True)
class BatchOptions:
    """What :func:`build_batch` needs besides the stage; constant for a run."""

    seed: int
    mask_token_id: int
    pad_token_id: int
    block_origin: str = "document"
    clean_tokens: str = "needed"
    length_multiple: int = 128
    row_multiple: int = 256


def stage_batch(samples: Sequence[Sample], stage: ResolvedStage, options: BatchOptions, **changed: Any) -> Batch:
    """The micro-batch of ``samples`` as ``stage`` wants it; ``changed`` are arguments of :func:`build_batch`."""
    objective = stage.objective
    arguments: dict[str, Any] = {
        "layout": stage.layout,
        "block_size": stage.block_size,
        "objective": objective.build(),
        "schedule": get_schedule(objective.schedule),
        "t_min": objective.t_min,
        "t_max": objective.t_max,
        "level": objective.level,
        "stage_index": stage.index,
        **vars(options),
    }
    return build_batch(samples, **(arguments | changed))


Place = tuple[int, int, int]  # consumed samples of the global batch; first sample and number of samples to take


class MicroBatches(Dataset[Batch | LladaMegaError]):
    """A place in the run -> its :class:`Batch`. Errors for the user are values here: workers would wrap what is raised
    into many lines."""

    def __init__(self, samples: CurriculumSamples, options: BatchOptions) -> None:
        self.samples, self.options = samples, options

    def __getitem__(self, place: Place) -> Batch | LladaMegaError:
        consumed, first, size = place
        stage = self.samples.curriculum.stage_at(consumed)
        try:
            samples = [self.samples[index] for index in range(first, first + size)]
            return stage_batch(samples, stage, self.options, consumed_samples=consumed)
        except LladaMegaError as error:
            return error


@dataclass(frozen=True)
class Places(Sampler[Place]):
    """The places of one rank, in order, without holding them all."""

    start_sample: int
    end_sample: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    @property
    def per_step(self) -> int:
        """Micro-batches of one rank in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def __len__(self) -> int:
        return len(range(self.start_sample, self.end_sample, self.global_batch_size)) * self.per_step

    def __iter__(self) -> Iterator[Place]:
        for consumed in range(self.start_sample, self.end_sample, self.global_batch_size):
            first = consumed + self.rank * self.per_step * self.micro_batch_size
            for number in range(self.per_step):
                yield consumed, first + number * self.micro_batch_size, self.micro_batch_size


def micro_batches(
    samples: CurriculumSamples,
    options: BatchOptions,
    *,
    start_sample: int = 0,
    end_sample: int | None = None,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    prefetch_factor: int | None = None,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches, one list a step.

    Args:
        start_sample: consumed samples of the run; any number.
        end_sample: steps start before it; default: the end of the curriculum.
        rank, world_size: in the data-parallel group.
        num_workers: processes that build batches; 0 builds them in this process when asked for.
        prefetch_factor: micro-batches that each worker builds ahead; default: so many that together they have the next
            step ready when it is asked for.

    Raises:
        ConfigError: at once, when the global batch does not split evenly into ranks and micro-batches.
        DataError: while iterating, when a corpus turns out damaged.
    """
    unit = micro_batch_size * world_size
    if global_batch_size % unit:
        raise ConfigError(
            f"trainer.global_batch_size={global_batch_size} is not a multiple of trainer.micro_batch_size="
            f"{micro_batch_size} times the data-parallel size {world_size}; use {-(-global_batch_size // unit) * unit}"
        )
    end = samples.curriculum.total_samples if end_sample is None else end_sample
    places = Places(start_sample, end, global_batch_size, micro_batch_size, rank, world_size)
    if prefetch_factor is None:
        prefetch_factor = max(2, -(-places.per_step // max(num_workers, 1)))
    loader = DataLoader(
        MicroBatches(samples, options),
        batch_size=None,
        sampler=places,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        # Not forked from this process: a fork inherits the locks of its threads (tokenizers, OpenMP) in any state.
        multiprocessing_context="forkserver" if num_workers else None,
        pin_memory=torch.cuda.is_available(),  # by Batch.pin_memory; in a thread where there are workers
        generator=torch.Generator(),  # the loader draws a seed: not from the run's global generator
    )
    return _steps(loader, places.per_step)


def _steps(loader: DataLoader[Batch | LladaMegaError], per_step: int) -> Iterator[list[Batch]]:
    step: list[Batch] = []
    for item in _watched(loader):
        if isinstance(item, LladaMegaError):
            raise item
        step.append(item)
        if len(step) == per_step:
            yield step
            step = []


def _watched(loader: DataLoader[Batch | LladaMegaError]) -> Iterator[Batch | LladaMegaError]:
    """Items of the loader; a worker that died is an error for the user."""
    try:
        with signals_held_back():
            items = iter(loader)  # starts the workers
        yield from items
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a data worker died, out of memory perhaps ({str(error).splitlines()[0]}); use a smaller data.num_workers"
        ) from error
