"""The dry run takes the largest batch there is, and leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from llada_mega.checkpoint.checkpoint import list_checkpoints
from llada_mega.config.curriculum import curriculum_of
from llada_mega.config.schema import Config
from llada_mega.errors import TrainingError
from llada_mega.models.model import BlockDiffusionModel
from llada_mega.parallel import current_groups
from llada_mega.training import run as run_module
from llada_mega.training.callback import Callback
from llada_mega.training.data import TrainingData
from llada_mega.training.dry_run import dry_run, largest_batch
from llada_mega.training.run import run_training
from llada_mega.training.trainer import Trainer
from tests.training.conftest import TINY_MOE, Train
from tests.training.rows import read_rows, untimed_state

STAGES = (
    "curriculum.stages=[{name: whole, block_size: 64, tokens: 512}, {name: four, block_size: 4, tokens: 512,"
    "embedding_noise: {decay_tokens: 256}}, {name: eight, block_size: 8, tokens: 512}]"
)


def test_the_largest_batch_is_of_the_stage_with_most_clean_tokens(configure: Callable[..., Config]) -> None:
    config = configure("run", STAGES)
    curriculum = curriculum_of(config)
    data = TrainingData(config, curriculum)
    stage, batch = largest_batch(config, curriculum, data.options)
    assert stage.name == "four"
    assert batch.num_rows >= 2 * 64 - 1  # noise level 1 - 1e-6: all but at most one token are masked
    for own in data.batches(0, rank=0, world_size=1):
        for other in own:
            assert other.input_ids_S.numel() <= batch.input_ids_S.numel()
            assert other.logit_rows_R.numel() <= batch.logit_rows_R.numel()
            assert other.mask.area() <= batch.mask.area()


@pytest.mark.parametrize("overrides", [(), (*TINY_MOE, "trainer.dtype=bfloat16")], ids=["dense", "moe-bfloat16"])
def test_it_leaves_weights_optimizer_biases_generators_and_data_alone(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    """Weights, expert biases and moments through the checksums of checkpoints, from before the first step on."""
    positions: list[int] = []
    forward = BlockDiffusionModel.forward

    def counted(self: BlockDiffusionModel, *args: object, **kwargs: object) -> object:
        positions.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BlockDiffusionModel, "forward", counted)
    states, counts = {}, {}
    build = run_module.build_callbacks
    for name in ("without", "with"):

        class Look(Callback):
            def on_train_begin(self, trainer: Trainer, name: str = name) -> None:
                states[name] = torch.get_rng_state()
                assert trainer.step.num_updates == 0

        monkeypatch.setattr(run_module, "build_callbacks", lambda *a, look=Look: [look(), *build(*a)])
        torch.manual_seed(0)
        positions.clear()
        train(
            name, STAGES, *overrides, f"trainer.dry_run={name == 'with'}", "checkpoint.every=1", "trainer.max_steps=3"
        )
        counts[name] = len(positions)
    assert counts["with"] == counts["without"] + 1
    assert torch.equal(states["with"], states["without"])
    assert read_rows(tmp_path / "with") == read_rows(tmp_path / "without")
    ends = [list_checkpoints(tmp_path / name / "checkpoints") for name in ("without", "with")]
    for one, other in zip(*ends, strict=True):
        index = Path("tensors") / "part_00000.json"
        assert json.loads((one / index).read_text())["sha256"] == json.loads((other / index).read_text())["sha256"]
        assert untimed_state(one) == untimed_state(other)


class Counter(torch.nn.Module):
    """Keeps a number besides weights, as modules for FP8 keep their scales."""

    count = 0

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.count)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.count = int(state)


def test_what_modules_keep_besides_weights_is_put_back(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("run", "trainer.max_steps=1")
    build = run_module.build_callbacks
    counts: list[int] = []

    class Look(Callback):
        def on_train_begin(self, trainer: Trainer) -> None:
            model, counter = trainer.step.bare_models[0], Counter()
            counter.count = 7
            model.counter = counter
            hook = model.register_forward_hook(lambda *_: counts.append(1) or setattr(counter, "count", 8))
            options = TrainingData(config, trainer.curriculum).options
            dry_run(trainer.step, config, trainer.curriculum, options)
            counts.append(counter.count)
            hook.remove()
            del model.counter

    monkeypatch.setattr(run_module, "build_callbacks", lambda *a: [Look(), *build(*a)])
    run_training(config, Console(quiet=True))
    assert counts == [1, 7]


def test_out_of_memory_names_the_stage_and_what_to_change(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: BlockDiffusionModel, *args: object, **kwargs: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB")

    monkeypatch.setattr(BlockDiffusionModel, "forward", forward)
    message = "stage four .*does not fit into memory.*1 PiB.*trainer.micro_batch_size"
    with pytest.raises(TrainingError, match=message):
        train("run", STAGES, "trainer.dry_run=true")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(Exception, match="not initialised"):
        current_groups()
