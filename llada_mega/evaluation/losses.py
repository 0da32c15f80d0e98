"""Held-out losses of eq. (1) and of the autoregressive model, the same for every run and machine.

Noise levels are stratified: with N windows and D draws a window, the N x D levels lie one in each of N x D equal parts
of (0, 1], and the draws of one window one in each of D equal parts. All levels and masks are pure functions of the seed
and the window's index, so two models, or two steps of a run, are compared on identical masks. Embedding noise is off.

At block size 1 the prediction of a masked token does not depend on the noise level: it sees the clean tokens before it
and its own MASK. Every token is then masked (t = 1), and the bound is the exact likelihood of the unshifted model,
without variance.

Legend: N windows, D draws a window, K bins of the noise level, R predicted rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llada_mega.data.batch import Batch, build_batch
from llada_mega.data.sample import Sample
from llada_mega.diffusion.objectives import DiffusionObjective
from llada_mega.diffusion.random import Stream, uniform
from llada_mega.diffusion.schedule import get_schedule
from llada_mega.errors import ConfigError
from llada_mega.evaluation.scoring import RowScores, Scorer, as_scorer
from llada_mega.inference.model import LoadedModel
from llada_mega.models import BlockDiffusionModel

Reduce = Callable[[Tensor], Tensor]
_CE, _WEIGHTED, _CORRECT, _COUNT = range(4)  # columns of the sums


def evaluate(
    model: BlockDiffusionModel | LoadedModel | Scorer,
    samples: Sequence[Sample],
    *,
    block_sizes: Sequence[int],
    noise_levels: int = 8,
    draws: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    block_origin: str = "document",
    clean_tokens: str = "needed",
    shard: tuple[int, int] = (0, 1),
    reduce: Reduce | None = None,
    on_pass: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Losses on fixed windows: ``{"ar_nll": x, "block_sizes": {"8": {...}}}`` in nats.

    For each block size: ``ce_masked`` (sum of the cross entropy over sum of masked tokens), ``nll_bound`` (cross
    entropy / t a supervised token: the bound of eq. (1), exact at block size 1), ``accuracy`` (masked tokens whose most
    probable token is right) and ``by_noise`` (``{"0-0.125": {"ce_masked", "accuracy", "tokens"}}``, bins of t in which
    something was masked). ``ar_nll`` is the shifted next-token cross entropy under the causal layout. A value without
    any token behind it is None.

    Args:
        model: a model, loaded or in training, or a scorer.
        samples: the windows, the same list on every rank.
        block_sizes: which to evaluate; an empty list leaves only ``ar_nll``.
        noise_levels: K, equal bins of t in ``by_noise``.
        draws: D, noise levels and masks a window.
        batch_size: windows of one forward pass.
        seed: of noise levels and masks.
        block_origin: ``document`` or ``sequence``.
        clean_tokens: ``needed`` or ``all``; changes no loss. Ranks that read different windows and hand each other
            tokens by all-gather need ``all``: with it their batches have one length.
        shard: (data-parallel rank, size): this rank takes every size-th window, so their number must be a multiple.
        reduce: sums a float64 tensor over data- and context-parallel ranks and pipeline stages; None when this process
            is alone.
        on_pass: called with (forward passes done, passes in all).
    Raises:
        ConfigError: nothing to evaluate on, the model has no MASK token, or a number is out of range.
    """
    scorer = as_scorer(model)
    _check(
        scorer, samples, block_sizes, {"noise_levels": noise_levels, "draws": draws, "batch_size": batch_size}, shard
    )
    evaluation = _Evaluation(
        scorer,
        samples,
        noise_levels,
        draws,
        batch_size,
        seed,
        block_origin,
        clean_tokens,
        shard,
        reduce or (lambda sums: sums),
    )
    if on_pass is not None:
        passes = [1 if block_size == 1 else draws for block_size in block_sizes]
        evaluation.report_to(on_pass, 1 + sum(passes))
    ar_nll = evaluation.ar_nll()
    return {"ar_nll": ar_nll, "block_sizes": {str(size): evaluation.block(size) for size in block_sizes}}


@dataclass
class _Evaluation:
    scorer: Scorer
    samples: Sequence[Sample]
    noise_levels: int
    draws: int
    batch_size: int
    seed: int
    block_origin: str
    clean_tokens: str
    shard: tuple[int, int]
    reduce: Reduce

    def __post_init__(self) -> None:
        self._report: Callable[[], None] = lambda: None

    def report_to(self, on_pass: Callable[[int, int], None], rounds: int) -> None:
        """Call ``on_pass`` after every forward pass of ``rounds`` rounds over the windows."""
        count, total = 0, rounds * len(list(self._chunks()))

        def report() -> None:
            nonlocal count
            count += 1
            on_pass(count, total)

        self._report = report

    def ar_nll(self) -> float | None:
        """Next-token cross entropy a predicted token."""
        sums = torch.zeros(2, dtype=torch.float64)
        for chunk in self._chunks():
            batch = self._batch([self.samples[index] for index in chunk], layout="ar", block_size=1)
            scores = self._score(batch)
            if scores is not None:
                sums[0] += scores.cross_entropy_R.double().sum().cpu()
                sums[1] += batch.num_rows
        loss, count = self.reduce(sums).tolist()
        return _divide(loss, count)

    def block(self, block_size: int) -> dict[str, Any]:
        """The entry of one block size."""
        exact = block_size == 1
        num_windows, draws = len(self.samples), 1 if exact else self.draws
        level_ND = torch.ones(num_windows, 1) if exact else stratified_levels(num_windows, draws, self.seed)
        sums = torch.zeros(self.noise_levels * 4 + 1, dtype=torch.float64)
        for draw in range(draws):
            for chunk in self._chunks():
                samples = [replace(self.samples[index], sample_index=index * draws + draw) for index in chunk]
                levels = [level_ND[index, draw].expand(len(self.samples[index])) for index in chunk]
                batch = self._batch(samples, layout="bdlm", block_size=block_size, noise_levels=levels)
                scores = self._score(batch)
                if scores is not None:
                    sums[:-1] += self._tabulate(batch, scores).flatten()
                    sums[-1] += batch.denominator  # supervised tokens
        sums = self.reduce(sums)
        table_K4 = sums[:-1].reshape(self.noise_levels, 4)
        whole = table_K4.sum(0).tolist()
        if exact:
            table_K4 = table_K4.sum(0).expand(self.noise_levels, 4)
        return {
            "ce_masked": _divide(whole[_CE], whole[_COUNT]),
            "nll_bound": _divide(whole[_WEIGHTED], float(sums[-1])),
            "accuracy": _divide(whole[_CORRECT], whole[_COUNT]),
            "by_noise": {
                level_name(level, self.noise_levels): {
                    "ce_masked": row[_CE] / row[_COUNT],
                    "accuracy": row[_CORRECT] / row[_COUNT],
                    "tokens": int(row[_COUNT]),
                }
                for level, row in enumerate(table_K4.tolist())
                if row[_COUNT]
            },
        }

    def _chunks(self) -> Iterator[Sequence[int]]:
        """This rank's windows, ``batch_size`` at a time."""
        mine = range(self.shard[0], len(self.samples), self.shard[1])
        return (mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size))

    def _batch(
        self, samples: list[Sample], *, layout: str, block_size: int, noise_levels: list[Tensor] | None = None
    ) -> Batch:
        config, schedule = self.scorer.config, get_schedule("linear")
        batch = build_batch(
            samples,
            layout=layout,
            block_size=block_size,
            objective=DiffusionObjective("elbo", schedule),
            seed=self.seed,
            mask_token_id=config.mask_token_id if config.mask_token_id is not None else 0,
            pad_token_id=config.pad_token_id if config.pad_token_id is not None else 0,
            t_min=0.0,
            t_max=1.0,
            level="sequence",
            schedule=schedule,
            block_origin=self.block_origin,
            clean_tokens=self.clean_tokens,
            length_multiple=self.scorer.length_multiple,
            row_multiple=self.scorer.row_multiple,
            noise_levels=noise_levels,
        )
        return self.scorer.part(batch)

    def _score(self, batch: Batch) -> RowScores | None:
        scores = self.scorer.score(batch)
        self._report()
        return scores

    def _tabulate(self, batch: Batch, scores: RowScores) -> Tensor:
        """Sums of a batch by noise level: float64 [K, 4]."""
        t_R = batch.noise_levels_R[: batch.num_rows].double().cpu()
        ce_R, correct_R = scores.cross_entropy_R.double().cpu(), scores.correct_R.double().cpu()
        columns_R4 = torch.stack([ce_R, ce_R / t_R, correct_R, torch.ones_like(ce_R)], dim=1)
        bin_R = ((t_R * self.noise_levels).ceil().long() - 1).clamp(0, self.noise_levels - 1)
        return torch.zeros(self.noise_levels, 4, dtype=torch.float64).index_add(0, bin_R, columns_R4)


def stratified_levels(num_windows: int, draws: int, seed: int) -> Tensor:
    """Noise levels in (0, 1]: float32 [N, D], one in each of N x D equal parts, row n one in each of D equal parts."""
    window_N, draw_D = torch.arange(num_windows), torch.arange(draws)
    rank_N = uniform(seed, Stream.EVALUATION, 0, window_N).argsort(stable=True).argsort()
    jitter_ND = uniform(seed, Stream.EVALUATION, 1, window_N[:, None], draw_D)
    fraction_ND = (draw_D + (rank_N[:, None] + jitter_ND.double()) / num_windows) / draws
    return (1.0 - fraction_ND).float()


def level_name(level: int, count: int) -> str:
    """Bounds in t of a bin of the noise level, for example ``0.125-0.25``."""
    return f"{level / count:.3g}-{(level + 1) / count:.3g}"


def _divide(value: float, count: float) -> float | None:
    return value / count if count else None


def _check(
    scorer: Scorer,
    samples: Sequence[Sample],
    block_sizes: Sequence[int],
    counts: dict[str, int],
    shard: tuple[int, int],
) -> None:
    if not samples:
        raise ConfigError("there are no held-out windows to evaluate on; give a longer corpus or fewer tokens a window")
    for name, value in [*counts.items(), *(("block_sizes", size) for size in block_sizes)]:
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if block_sizes and scorer.config.mask_token_id is None:
        raise ConfigError(
            "the model has no MASK token; convert it with llada-mega convert import, or leave block_sizes=[]"
        )
    if len(samples) % shard[1]:
        raise ConfigError(f"{len(samples)} held-out windows do not split over {shard[1]} ranks; use a multiple")
