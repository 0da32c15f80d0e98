"""The plan of a run: will it fit, how fast will it be, how long will it take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from llada_mega.config.count import active_parameters, total_parameters
from llada_mega.config.curriculum import curriculum_of
from llada_mega.config.data import Corpus
from llada_mega.config.layout import data_parallel_size
from llada_mega.config.run import ParallelConfig
from llada_mega.config.validate import validate
from llada_mega.diffusion.stages import ResolvedStage
from llada_mega.errors import ConfigError
from llada_mega.planning.hardware import Device, choose_device
from llada_mega.planning.host import host_memory
from llada_mega.planning.memory import GIB, Copies, Sizes, peak_memory, sizes_of
from llada_mega.planning.options import PlanOptions
from llada_mega.planning.results import Plan, RankPlan, StagePlan
from llada_mega.planning.shapes import Shape, shape_of_stage
from llada_mega.planning.share import Share, share_of_stage
from llada_mega.planning.step_time import StepTime, Work, sent_by_rank, step_time
from llada_mega.training.flops import STEP, forward_flops

_DAY = 86400.0


class Planner:
    """Plans layouts of one run on one kind of device.

    Args:
        options: validated by :func:`prepare`.
    """

    def __init__(self, options: PlanOptions) -> None:
        self.options = options
        self.device: Device = choose_device(options.hardware, options.trainer.dtype)
        self.dtype: torch.dtype = getattr(torch, options.trainer.dtype)
        wanted = options.model.implementation
        self.implementation = self.device.implementation if wanted == "auto" else wanted
        self.stages = curriculum_of(options).stages
        self.usable = self.device.memory_gib - options.assume.reserved_gib
        self._shapes: dict[int, list[Shape]] = {}

    def shapes(self, micro_batch_size: int) -> list[Shape]:
        """Of every stage's micro-batches, worked out once."""
        if micro_batch_size not in self._shapes:
            trainer = replace(self.options.trainer, micro_batch_size=micro_batch_size)
            options = replace(self.options, trainer=trainer)
            length = self.options.assume.document_length
            self._shapes[micro_batch_size] = [shape_of_stage(options, stage, length) for stage in self.stages]
        return self._shapes[micro_batch_size]

    def memory(self, parallel: ParallelConfig, micro_batch_size: int, gpus: int) -> tuple[RankPlan, ...]:
        """The peak of every pipeline stage, at the curriculum stage where it is highest and all tokens are masked."""
        copies, count = Copies.of(parallel, gpus), self._micro_batches(parallel, micro_batch_size, gpus)
        return tuple(
            self._rank(share_of_stage(self.options.model, parallel, stage), parallel, micro_batch_size, copies, count)
            for stage in range(parallel.pp)
        )

    def plan(self, parallel: ParallelConfig, micro_batch_size: int, gpus: int) -> Plan:
        """Everything about one layout that :func:`validate` accepts."""
        options = self.options
        ranks = self.memory(parallel, micro_batch_size, gpus)
        stages = tuple(
            self._stage(stage, shape, parallel, micro_batch_size, gpus)
            for stage, shape in zip(self.stages, self.shapes(micro_batch_size), strict=True)
        )
        days = sum(stage.days for stage in stages)
        peak = max(rank.total_gib for rank in ranks)
        return Plan(
            run=options.run.name,
            model={"parameters": total_parameters(options.model), "active": active_parameters(options.model)},
            hardware=asdict(self.device),
            implementation=self.implementation,
            gpus=gpus,
            data_parallel=data_parallel_size(parallel, gpus),
            micro_batches=self._micro_batches(parallel, micro_batch_size, gpus),
            parallel=asdict(parallel),
            micro_batch_size=micro_batch_size,
            dtype=options.trainer.dtype,
            async_save=options.checkpoint.async_save,
            ranks=ranks,
            stages=stages,
            assume=asdict(options.assume),
            fits=all(rank.fits for rank in ranks),
            peak_gib=peak,
            usable_gib=self.usable,
            days=days,
            gpu_hours=days * 24 * gpus,
            mean_mfu=sum(stage.mfu * stage.days for stage in stages) / days,
        )

    def days(self, parallel: ParallelConfig, micro_batch_size: int, gpus: int) -> float:
        """Of the whole curriculum."""
        shapes = self.shapes(micro_batch_size)
        known: dict[Shape, float] = {}
        total = 0.0
        for stage, shape in zip(self.stages, shapes, strict=True):
            if shape not in known:
                known[shape] = self._stage(stage, shape, parallel, micro_batch_size, gpus).step_seconds
            total += stage.num_samples / self.options.trainer.global_batch_size * known[shape] / _DAY
        return total

    def _rank(
        self, share: Share, parallel: ParallelConfig, micro_batch_size: int, copies: Copies, count: int
    ) -> RankPlan:
        # More positions and more rows need more memory, so only the largest combinations are looked at.
        names: dict[tuple[int, int], tuple[str, Shape]] = {}
        for stage, shape in zip(self.stages, self.shapes(micro_batch_size), strict=True):
            extent = (shape.positions(parallel), shape.most_rows)
            names.setdefault(extent, (stage.name, shape))
        largest = [
            place
            for extent, place in names.items()
            if not any(other != extent and other[0] >= extent[0] and other[1] >= extent[1] for other in names)
        ]
        peaks = [
            (peak_memory(self.options.model, parallel, share, copies, sizes, count), name, sizes)
            for name, shape in largest
            for sizes in [self._sizes(shape, parallel, shape.most_rows)]
        ]
        peak, name, sizes = max(peaks, key=lambda found: found[0].total)
        total = peak.total / GIB
        host, together = self._host(share, parallel, copies, sizes)
        return RankPlan(
            share.stage,
            len(share.layers),
            share.total_parameters,
            peak.moment,
            name,
            _gib(peak.components),
            total,
            total <= self.usable,
            _gib(host),
            sum(_gib(together).values()),
        )

    def _host(
        self, share: Share, parallel: ParallelConfig, copies: Copies, sizes: Sizes
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Host memory of the first rank of a stage, and of all that are with it on its host."""
        assume = self.options.assume
        processes = (assume.process_gib + self.options.data.num_workers * assume.worker_gib) * GIB
        ranks = min(self.device.host_size, parallel.tp * copies.dense)
        rank, together = (
            host_memory(self.options.model, parallel, share, copies, sizes, processes=processes, ranks=number)
            for number in (1, ranks)
        )
        return rank, together

    def _stage(
        self, stage: ResolvedStage, shape: Shape, parallel: ParallelConfig, micro_batch_size: int, gpus: int
    ) -> StagePlan:
        options, model = self.options, self.options.model
        copies, count = Copies.of(parallel, gpus), self._micro_batches(parallel, micro_batch_size, gpus)
        sizes = self._sizes(shape, parallel, shape.rows)
        slowest: tuple[StepTime, dict[str, float]] | None = None
        for pipeline_stage in _different_stages(parallel):
            share = share_of_stage(model, parallel, pipeline_stage)
            work = Work.of(model, parallel, share, sizes, shape)
            sent = sent_by_rank(model, parallel, share, copies, sizes, shape.keys_sent(parallel), count)
            time = step_time(
                parallel,
                share,
                copies,
                sizes,
                work,
                sent,
                count,
                self.device,
                options.assume,
                options.trainer.dtype,
                options.trainer.fp8 is not None,
            )
            if slowest is None or time.total > slowest[0].total:
                slowest = time, sent
        assert slowest is not None
        time, sent = slowest
        batch = options.trainer.global_batch_size
        useful = forward_flops(
            model, shape.noisy + shape.clean, shape.visible_pairs, shape.rows, shape.logit_pairs
        ).total
        flops = STEP * useful * batch / micro_batch_size
        steps = stage.num_samples // batch
        days = steps * time.total / _DAY
        return StagePlan(
            name=stage.name,
            block_size=stage.block_size,
            layout=stage.layout,
            tokens=stage.num_samples * stage.sequence_length,
            steps=steps,
            positions=sizes.positions,
            logit_rows=sizes.logit_rows,
            tflop=flops / 1e12,
            sent_gib=_gib(sent),
            seconds=asdict(time),
            step_seconds=time.total,
            mfu=flops / (time.total * gpus * self.device.peak_tflops[options.trainer.dtype] * 1e12),
            tokens_per_day=batch * stage.sequence_length / time.total * _DAY,
            days=days,
            gpu_hours=days * 24 * gpus,
        )

    def _sizes(self, shape: Shape, parallel: ParallelConfig, rows: float) -> Sizes:
        return sizes_of(
            self.options.model,
            parallel,
            shape.positions(parallel),
            shape.logit_rows(parallel, rows),
            self.dtype,
            expert_load=self.options.assume.expert_load,
            te=self.implementation == "te",
        )

    def _micro_batches(self, parallel: ParallelConfig, micro_batch_size: int, gpus: int) -> int:
        ranks = data_parallel_size(parallel, gpus)
        return self.options.trainer.global_batch_size // (micro_batch_size * ranks)


def prepare(options: PlanOptions) -> None:
    """Fill in what a plan does not need, and refuse what no run could have.

    Raises:
        ConfigError: the message names the key.
    """
    if not options.data.train:
        options.data.train = [Corpus("not read")]
    choose_device(options.hardware, options.trainer.dtype)
    validate(options, options.gpus)


def make_plan(options: PlanOptions) -> Plan:
    """The plan of the run's own layout, on ``gpus`` devices or on the fewest on which it fits.

    Raises:
        ConfigError: the layout does not go with the number of devices, or no number of devices is enough.
    """
    planner, micro = Planner(options), options.trainer.micro_batch_size
    if options.gpus is not None:
        return planner.plan(options.parallel, micro, options.gpus)
    counts = list(_possible_devices(options))
    if not counts:
        raise ConfigError(
            f"trainer.global_batch_size={options.trainer.global_batch_size} goes with no number of devices under this "
            "layout; give gpus=N to see why"
        )
    for gpus in counts:
        if all(rank.fits for rank in planner.memory(options.parallel, micro, gpus)):
            return planner.plan(options.parallel, micro, gpus)
    return planner.plan(options.parallel, micro, counts[-1])


def _possible_devices(options: PlanOptions) -> Sequence[int]:
    """Numbers of devices that the layout and the global batch allow, in order."""
    parallel, trainer, found = options.parallel, options.trainer, []
    micro_batches = trainer.global_batch_size // trainer.micro_batch_size
    for data_parallel in range(1, micro_batches + 1):
        gpus = data_parallel * parallel.tp * parallel.cp * parallel.pp
        if micro_batches % data_parallel == 0 and gpus % (parallel.etp * parallel.ep * parallel.pp) == 0:
            try:
                validate(options, gpus)
                found.append(gpus)
            except ConfigError:
                pass
    return found


def _different_stages(parallel: ParallelConfig) -> list[int]:
    """Pipeline stages that may take different times: the ends, and one between them."""
    return sorted({0, min(1, parallel.pp - 1), parallel.pp - 1})


def _gib(parts: dict[str, float]) -> dict[str, float]:
    return {name: size / GIB for name, size in parts.items()}
