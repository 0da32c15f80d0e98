"""Host memory of the processes of a run: the copy that a checkpoint is written from, offloaded activations, processes.

Every part of the model and of the optimizer is copied by one rank (``checkpoint/storage.py``): weights by the first of
the data-parallel ranks that have them, the optimizer's state by whoever keeps it.
"""

from __future__ import annotations

from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.planning.activations import WIDE, Bytes, Sizes, layer
from llada_mega.planning.memory import Copies
from llada_mega.planning.share import Share

CHECKPOINT, OFFLOADED, PROCESSES = "checkpoint", "offloaded activations", "processes"
HOST_COMPONENTS = (CHECKPOINT, OFFLOADED, PROCESSES)


def checkpoint_copy(parallel: ParallelConfig, share: Share, copies: Copies, element: int, ranks: int = 1) -> float:
    """Bytes that the first ``ranks`` ranks of a pipeline stage copy, all together.

    Norms and routers, which tensor-parallel ranks hold alike, count on each of them.
    """
    state = 2 * WIDE + (WIDE if element < WIDE else 0)
    total = 0.0
    for parameters, same, holders in (
        (share.dense_parameters, copies.dense, parallel.tp),
        (share.expert_parameters, copies.experts, parallel.etp * parallel.ep),
    ):
        first = parameters * min(ranks, holders)  # ranks beyond these hold what others copy
        total += first * element
        total += state * (parameters * ranks / same if parallel.distributed_optimizer else first)
    return total


def offloaded(model: ModelConfig, parallel: ParallelConfig, sizes: Sizes) -> float:
    """Bytes of activations that wait in host memory for the backward pass."""
    return sum(sum(layer(model, parallel, index, sizes).values()) for index in range(parallel.offload_layers))


def host_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    share: Share,
    copies: Copies,
    sizes: Sizes,
    *,
    processes: float,
    ranks: int = 1,
) -> Bytes:
    """Bytes by component of the first ``ranks`` ranks of a pipeline stage, those that copy most, all together.

    Args:
        processes: bytes of a rank's process and of its data workers.
    """
    found = {
        CHECKPOINT: checkpoint_copy(parallel, share, copies, sizes.element, ranks),
        OFFLOADED: ranks * offloaded(model, parallel, sizes),
        PROCESSES: ranks * processes,
    }
    return {component: size for component, size in found.items() if size}
