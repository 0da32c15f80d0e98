"""The parts of ``make bench`` measure what they say, on small sizes; no time is asserted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench import __main__ as all_parts
from bench import data_pipeline
from bench.observed_run import observe
from bench.step import benchmark_model, compare, prepare
from llada_mega.checkpoint.checkpoint import list_checkpoints
from llada_mega.config.run import ParallelConfig
from llada_mega.parallel import destroy, initialize
from tests.training.conftest import corpus  # noqa: F401  (a fixture)


def test_both_steps_agree_on_several_documents() -> None:
    """The packed sequence of the scaling table is the same one for both, and counts fewer pairs than one document."""
    documents, block_size = [40, 24, 32], 16
    model = dataclasses.replace(benchmark_model(), num_layers=2)
    pair, whole = (prepare(model, lengths, block_size) for lengths in (documents, [sum(documents)]))
    found = compare(pair)
    assert found.loss <= 1e-6
    assert found.gradient <= 1e-5, found.worst
    assert 0 < found.reference_gradient <= 1e-5
    assert pair.step_flops < whole.step_flops


def test_the_parts_of_the_data_pipeline_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_pipeline, "CORPUS_TOKENS", 200_000)
    data_pipeline.write_corpus(tmp_path / "tokens", 500)
    packed = data_pipeline.open_packed(tmp_path / "tokens")
    found = data_pipeline.rate(packed, 32, 500, count=3)
    assert found.documents_per_sample > 1
    assert set(found.milliseconds) == set(data_pipeline.PARTS)
    whole = data_pipeline.samples_of(packed, data_pipeline.LENGTH)
    assert whole.curriculum.stages[0].layout == "mdlm" and torch.equal(whole[3].tokens, packed.sample(0, 3).tokens)


def test_every_step_is_observed(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    destroy()  # of the models that other tests of this file built
    seconds = observe(
        tmp_path / "run",
        [
            f"data.train=[{{path: {corpus}}}]",
            "data.sequence_length=64",
            "trainer.global_batch_size=1",
            "model=tiny",
            "curriculum.stages=[{name: only, block_size: 4, tokens: 192}]",
            "checkpoint.every=2",
            "checkpoint.async=true",
            "trainer.micro_batch_size=1",
        ],
    )
    observed = (seconds.data, seconds.step, seconds.checkpoint, seconds.checkpoint_cpu)
    assert [len(values) for values in observed] == [3, 3, 3, 3]
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 2


def test_a_part_does_not_meet_the_process_groups_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destroy()

    def part(output: Path, images: Path) -> int:
        return initialize(ParallelConfig(), seed=1).world_size

    monkeypatch.setattr(all_parts, "PARTS", {"one": part, "two": part})
    monkeypatch.setattr("sys.argv", ["bench", "--output", str(tmp_path), "--images", str(tmp_path)])
    all_parts.main()
    assert json.loads((tmp_path / "two.json").read_text())["result"] == 1
