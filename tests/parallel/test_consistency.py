"""A difference between ranks that share samples stops the run and names the rank."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llada_mega.config.run import ParallelConfig
from llada_mega.data.batch import Batch, build_batch
from llada_mega.data.sample import Sample
from llada_mega.diffusion.objectives import DiffusionObjective
from llada_mega.diffusion.schedule import LinearSchedule
from llada_mega.errors import TrainingError
from llada_mega.parallel import initialize
from llada_mega.parallel.consistency import checksum
from tests.parallel.harness import run_ranks

pytestmark = pytest.mark.latest

# What a rank may hold that the others do not, by the word of the message.
PLANTED = {
    "tokens": lambda b: b.input_ids_S[3].add_(1),
    "positions": lambda b: b.padding_S[-1].logical_not_(),
    "attention masks": lambda b: b.mask.endpoints[1, 5].add_(1),
    "masked tokens": lambda b: b.labels_R[0].add_(1),
    "noise levels": lambda b: b.noise_levels_R[0].mul_(1.0000002),
    "embedding noise": lambda b: b.row_sample_R[0].add_(1),
}


def batch(first_sample: int) -> Batch:
    samples = [
        Sample(
            tokens=torch.arange(16) + index,
            document_lengths=[10, 6],
            padding=[False, False],
            supervised=torch.ones(16, dtype=torch.bool),
            sample_index=index,
        )
        for index in (first_sample, first_sample + 1)
    ]
    return build_batch(
        samples,
        layout="bdlm",
        block_size=4,
        objective=DiffusionObjective("elbo", LinearSchedule()),
        schedule=LinearSchedule(),
        seed=1,
        mask_token_id=99,
        pad_token_id=0,
    )


def compare(parallel: ParallelConfig, kind: str | None, guilty: int, steps: list[int], every: int) -> list[str | None]:
    """What the callback says at each of ``steps`` when rank ``guilty`` holds something else."""
    from llada_mega.training.callbacks.consistency import ConsistencyCallback

    groups = initialize(parallel)
    callback = ConsistencyCallback(every)
    said: list[str | None] = []
    for step in steps:
        batches = [batch(10 * groups.dp.rank() + micro) for micro in range(2)]
        if kind is not None and groups.rank == guilty:
            PLANTED[kind](batches[1])
        trainer = SimpleNamespace(state=SimpleNamespace(step=step - 1), step=SimpleNamespace(groups=groups))
        try:
            callback.on_batches(trainer, batches)  # type: ignore[arg-type]
            said.append(None)
        except TrainingError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("kind", list(PLANTED))
def test_one_rank_of_four_is_named_on_all(kind: str) -> None:
    said = run_ranks(compare, 4, parallel=ParallelConfig(tp=2, pp=2), kind=kind, guilty=3, steps=[1], every=100)
    assert len(set(map(tuple, said))) == 1
    wanted = f"step 1: rank 3 (dp 0, pp 1, cp 0, tp 1, ep 0) has other {kind} than 3 others, among them rank 0 ("
    assert said[0][0].startswith(wanted)
    assert "\n" not in said[0][0]


def test_two_ranks_that_differ_are_both_named() -> None:
    said = run_ranks(compare, 2, parallel=ParallelConfig(cp=2), kind="tokens", guilty=0, steps=[1], every=100)
    assert "rank 1 (dp 0, pp 0, cp 1, tp 0, ep 0) has other tokens than rank 0 (dp 0, pp 0, cp 0" in said[1][0]


def test_data_parallel_ranks_hold_different_samples() -> None:
    said = run_ranks(compare, 4, parallel=ParallelConfig(tp=2), kind=None, guilty=0, steps=[1, 2], every=1)
    assert said == [[None, None]] * 4
    said = run_ranks(compare, 4, parallel=ParallelConfig(tp=2), kind="tokens", guilty=2, steps=[1], every=1)
    assert "rank 3 (dp 1, pp 0, cp 0, tp 1, ep 0) has other tokens than rank 2 (dp 1" in said[0][0]
    assert "rank 0" not in said[0][0]


def test_the_first_step_and_every_nth_are_compared() -> None:
    steps = [7, 8, 9, 10, 11, 20]  # resumed at step 6
    said = run_ranks(compare, 2, parallel=ParallelConfig(tp=2), kind="tokens", guilty=1, steps=steps, every=10)
    assert [message is not None for message in said[0]] == [True, False, False, True, False, True]


def test_the_checksum_sees_values_order_dtype_and_shape() -> None:
    a, b = torch.arange(6), torch.arange(6).flip(0)
    sums = [checksum(tensors) for tensors in ([a], [a, b], [b, a], [a.int()], [a.view(2, 3)], [a.float()], [a + 1], [])]
    assert len(set(sums)) == len(sums)
    assert checksum([a, b]) == checksum([a.clone(), torch.arange(12)[:6].flip(0)])
    assert all(-(2**63) <= value < 2**63 for value in sums)


def test_a_batch_that_was_built_again_is_the_same() -> None:
    from llada_mega.training.callbacks.consistency import batch_checksums

    assert batch_checksums([batch(1), batch(2)]) == batch_checksums([batch(1), batch(2)])
    one = batch(1)
    changed = replace(one, block_size=8)
    assert [kind for kind, value in batch_checksums([changed]).items() if value != batch_checksums([one])[kind]] == [
        "sizes"
    ]
