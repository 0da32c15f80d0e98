"""A micro-batch: the one place where ids, masks, logit rows, labels and weights are put together.

The model always runs one row (B = 1): a micro-batch of several samples is their concatenation,
``[noisy of all ; kept clean of all ; rounding]``, and samples are groups of documents.

Legend: L tokens of all samples together, C clean copies that are kept, S positions of the model (L + C rounded up),
R logit rows (masked tokens rounded up).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np
import torch
from llada_kernels import IntervalMask
from llada_kernels.exchange import RankExchange
from torch import Tensor

from llada_mega.data.sample import Sample
from llada_mega.diffusion.corruption import corrupt
from llada_mega.diffusion.noise_levels import draw_noise_levels
from llada_mega.diffusion.objectives import Objective
from llada_mega.diffusion.schedule import Schedule
from llada_mega.diffusion.visibility import build_visibility

ROW_MULTIPLE = 256


@dataclass(eq=False)
class Batch:
    """One micro-batch. Tensors are on the CPU until :meth:`to`.

    Attributes:
        input_ids_S: int64; noisy ids, then kept clean ids, then the pad id.
        position_ids_S: int64; both copies of a token have its position in its document.
        padding_S: bool, True for padding documents and rounding: no loss, no expert load.
        mask: who sees whom, S rows and S keys; stays on the CPU, where plans are made from it.
        logit_rows_R: int64 indices into S of the tokens to predict; after ``num_rows`` come fillers (row 0, label 0,
            weight 0, sample and position 0).
        labels_R: int64 clean tokens.
        weights_R: float32 loss weights.
        noise_levels_R: float32 t of each row; 0 for layout ``ar``.
        row_sample_R: int64 global sample index; row_position_R: int64 position in that sample. The keys of the
            embedding noise.
        num_rows: rows that are no filler.
        num_noisy: positions of the noisy half, the first; all S where there is one half.
        denominator: what this micro-batch adds to the global denominator.
        num_tokens: data tokens, without padding, counted once.
        layout, block_size, stage_index: of the stage.
        consumed_samples: samples of the run before this micro-batch's global batch.
        key_exchange: of a context-parallel part (:mod:`llada_mega.data.context`), how attention comes by the keys of
            other ranks; ``mask`` then has S rows and as many keys as there are after that. None: it needs none.
    """

    input_ids_S: Tensor
    position_ids_S: Tensor
    padding_S: Tensor
    mask: IntervalMask
    logit_rows_R: Tensor
    labels_R: Tensor
    weights_R: Tensor
    noise_levels_R: Tensor
    row_sample_R: Tensor
    row_position_R: Tensor
    num_rows: int
    num_noisy: int
    denominator: int
    num_tokens: int
    layout: str
    block_size: int
    stage_index: int = 0
    consumed_samples: int = 0
    key_exchange: RankExchange | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``, but for the mask and the logit rows: plans are made from them on the host."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moves = torch.is_tensor(value) and field.name != "logit_rows_R"
            moved[field.name] = value.to(device, non_blocking=True) if moves else value
        return Batch(**moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, the mask's endpoints and the logit rows too, with the mask's plans.

        Copies from there to a GPU wait for nothing. The data loader calls this where there is one.
        """
        pinned: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            pinned[field.name] = value.pin_memory() if torch.is_tensor(value) else value
        mask = IntervalMask(self.mask.endpoints.pin_memory(), self.mask.total_k)
        mask.plans.update(self.mask.plans)
        return Batch(**pinned | {"mask": mask})

    def __getstate__(self) -> dict[str, Any]:
        """NumPy arrays in place of tensors, and no plans.

        A tensor that a worker process sends takes a file descriptor and a connection, and a step may have hundreds of
        micro-batches; an array is a string of bytes.
        """
        state = {name: value.numpy() if torch.is_tensor(value) else value for name, value in vars(self).items()}
        return state | {"mask": (self.mask.endpoints.numpy(), self.mask.total_k)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        endpoints, total_k = state.pop("mask")
        for name, value in state.items():
            setattr(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)
        self.mask = IntervalMask(torch.from_numpy(endpoints), total_k)


@dataclass
class _Rows:
    """Rows with logits, before rounding: indices into L, labels, noise levels and weights."""

    index: Tensor
    labels: Tensor
    noise_levels: Tensor
    weights: Tensor
    denominator: int


def build_batch(
    samples: Sequence[Sample],
    *,
    layout: str,
    block_size: int,
    objective: Objective,
    schedule: Schedule,
    seed: int,
    mask_token_id: int,
    pad_token_id: int,
    t_min: float = 0.0,
    t_max: float = 1.0,
    level: str = "sequence",
    block_origin: str = "document",
    clean_tokens: str = "needed",
    length_multiple: int = 128,
    row_multiple: int = ROW_MULTIPLE,
    noise_levels: Sequence[Tensor] | None = None,
    stage_index: int = 0,
    consumed_samples: int = 0,
) -> Batch:
    """Corrupt samples and lay them out for the model; a pure function of its arguments.

    Layouts ``bdlm`` (eq. (1), (3)) and ``mdlm`` (eq. (2), (4)) have a row for every masked token, with the clean token
    at the same position as label. Layout ``ar`` keeps the tokens clean and has a row for every token with a supervised
    successor in its document, with that successor as label, weight 1 and denominator = rows.

    Args:
        samples: of any lengths.
        objective: row weights and denominator.
        seed: of the run; with ``sample_index`` and position it fixes noise levels and masks.
        t_min, t_max, level: band and unit of the noise levels.
        length_multiple: S is rounded up to a multiple of it (128 x TP x CP).
        row_multiple: R likewise; R is at least this much.
        noise_levels: t of every token of each sample (float32), instead of a draw.

    Raises:
        ConfigError: unknown layout, level, block origin or clean-token policy.
    """
    lengths = list(chain.from_iterable(sample.document_lengths for sample in samples))
    padding = list(chain.from_iterable(sample.padding for sample in samples))
    visibility = build_visibility(
        layout,
        lengths,
        padding=padding,
        block_size=block_size,
        block_origin=block_origin,
        clean_tokens=clean_tokens,
        sequence_lengths=[len(sample) for sample in samples],
    )
    lengths_D = torch.tensor(lengths)
    padding_L = torch.repeat_interleave(torch.tensor(padding), lengths_D)
    position_L = _counters(lengths_D)
    clean_L = torch.cat([sample.tokens for sample in samples]).masked_fill(padding_L, pad_token_id)
    supervised_L = torch.cat([sample.supervised for sample in samples]) & ~padding_L
    if layout == "ar":
        noisy_L, rows = clean_L, _next_token_rows(clean_L, supervised_L, position_L)
    else:
        if noise_levels is None:
            noise_levels = [
                draw_noise_levels(
                    seed, s.sample_index, s.document_lengths, block_size, level, t_min, t_max, block_origin
                )
                for s in samples
            ]
        noisy_L, masked_L = _corrupt_all(samples, clean_L, supervised_L, noise_levels, seed, mask_token_id, schedule)
        index = masked_L.nonzero().flatten()
        t_R = torch.cat(list(noise_levels))[index]
        denominator = objective.denominator(int(supervised_L.sum()), len(index))
        rows = _Rows(index, clean_L[index], t_R, objective.row_weights(t_R), denominator)

    copies = torch.cat((torch.arange(len(clean_L)), visibility.clean_positions))  # index into L of every position
    num_positions = round_up(len(copies), length_multiple)
    input_ids = torch.cat((noisy_L, clean_L[visibility.clean_positions]))
    num_rows = round_up(max(len(rows.index), 1), row_multiple)
    sample_L = torch.cat([torch.full((len(s),), s.sample_index, dtype=torch.int64) for s in samples])
    in_sample_L = _counters(torch.tensor([len(sample) for sample in samples]))
    return Batch(
        input_ids_S=extend(input_ids, num_positions, pad_token_id),
        position_ids_S=extend(position_L[copies], num_positions, 0),
        padding_S=extend(padding_L[copies], num_positions, True),
        mask=visibility.mask.pad(num_positions, num_positions),
        logit_rows_R=extend(rows.index, num_rows, 0),
        labels_R=extend(rows.labels, num_rows, 0),
        weights_R=extend(rows.weights, num_rows, 0.0),
        noise_levels_R=extend(rows.noise_levels, num_rows, 0.0),
        row_sample_R=extend(sample_L[rows.index], num_rows, 0),
        row_position_R=extend(in_sample_L[rows.index], num_rows, 0),
        num_rows=len(rows.index),
        num_noisy=len(clean_L) if layout == "bdlm" else num_positions,
        denominator=rows.denominator,
        num_tokens=int((~padding_L).sum()),
        layout=layout,
        block_size=block_size,
        stage_index=stage_index,
        consumed_samples=consumed_samples,
    )


def _corrupt_all(
    samples: Sequence[Sample],
    clean_L: Tensor,
    supervised_L: Tensor,
    noise_levels: Sequence[Tensor],
    seed: int,
    mask_token_id: int,
    schedule: Schedule,
) -> tuple[Tensor, Tensor]:
    """Every sample with its own key, so that a mask does not depend on the batch around it: noisy_L, masked_L."""
    sizes = [len(sample) for sample in samples]
    corrupted = [
        corrupt(
            tokens,
            supervised,
            t,
            seed=seed,
            sample_index=sample.sample_index,
            mask_token_id=mask_token_id,
            schedule=schedule,
        )
        for sample, tokens, supervised, t in zip(
            samples, clean_L.split(sizes), supervised_L.split(sizes), noise_levels, strict=True
        )
    ]
    noisy, masked = zip(*corrupted, strict=True)
    return torch.cat(noisy), torch.cat(masked)


def _next_token_rows(clean_L: Tensor, supervised_L: Tensor, position_L: Tensor) -> _Rows:
    """A row where the next token is supervised and does not start a document. Padding is never supervised."""
    index = (supervised_L[1:] & (position_L[1:] > 0)).nonzero().flatten()
    ones = torch.ones(len(index))
    return _Rows(index, clean_L[index + 1], torch.zeros(len(index)), ones, len(index))


def _counters(lengths: Tensor) -> Tensor:
    """0, 1, ... restarting for each length: int64 [sum of lengths]."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) - torch.repeat_interleave(starts, lengths)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``number``."""
    return -(-number // multiple) * multiple


def extend(values: Tensor, size: int, fill: float) -> Tensor:
    """A vector with ``fill`` appended up to ``size`` entries."""
    return torch.nn.functional.pad(values, (0, size - len(values)), value=fill)
