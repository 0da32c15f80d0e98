"""Do ranks that must hold the same data hold the same? One small all-gather answers, and names those that do not.

Every rank of a model-parallel group builds its batch by itself, from (seed, sample index). What can go wrong then is
what a broadcast would hide or a collective would turn into nonsense: one node reads another corpus, runs another
version of the code, or has a broken memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from llada_mega.errors import TrainingError
from llada_mega.parallel.groups import COORDINATES, ParallelGroups, rank_name


def checksum(tensors: Iterable[Tensor]) -> int:
    """64 bits (signed, as int64 holds them) of the values, dtypes and shapes of CPU tensors, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def check_agreement(checksums: Mapping[str, int], groups: ParallelGroups, step: int) -> None:
    """Compare over the tensor-, pipeline- and context-parallel ranks of every data-parallel rank. A collective.

    Args:
        checksums: of each kind of data by its name, the same names on every rank.
        groups: process groups.
        step: for the message.

    Raises:
        TrainingError: on every rank of the run, naming the ranks that differ and in what.
    """
    own = [groups.coordinates[name] for name in COORDINATES] + list(checksums.values())
    gathered = [torch.empty(len(own), dtype=torch.int64, device=groups.device) for _ in range(groups.world_size)]
    dist.all_gather(gathered, torch.tensor(own, dtype=torch.int64, device=groups.device))
    rows = [row.tolist() for row in gathered]
    sums = [tuple(row[len(COORDINATES) :]) for row in rows]
    names = [rank_name(rank, dict(zip(COORDINATES, row, strict=False))) for rank, row in enumerate(rows)]
    problems = []
    for dp_rank in range(groups.dp.size()):
        ranks = [rank for rank, row in enumerate(rows) if row[COORDINATES.index("dp")] == dp_rank]
        problems += _differences(ranks, sums, list(checksums), names)
    if problems:
        raise TrainingError(
            f"step {step}: {'; '.join(problems)}. Ranks that share samples must build the same batch: check that all "
            "machines read the same files with the same version; trainer.consistency_every=0 turns this check off"
        )


def _differences(ranks: list[int], sums: list[tuple[int, ...]], kinds: list[str], names: list[str]) -> list[str]:
    """What to say of the ranks that do not hold what most of ``ranks`` hold."""
    (usual, holders), *_ = Counter(sums[rank] for rank in ranks).most_common()
    others = [rank for rank in ranks if sums[rank] != usual]
    reference = next(rank for rank in ranks if sums[rank] == usual)
    told = []
    for rank in others:
        differing = " and ".join(kind for kind, a, b in zip(kinds, sums[rank], usual, strict=True) if a != b)
        rest = names[reference] if holders == 1 else f"{holders} others, among them {names[reference]}"
        told.append(f"{names[rank]} has other {differing} than {rest}")
    return told
