"""One forward and backward pass over the largest batch of the curriculum: memory is short before training or never.

It leaves nothing behind: the batch is made up, the optimizer does not run, gradients are cleared by the next step, the
counts that move expert biases are forgotten, what modules keep besides weights (scales of FP8) is put back, and nothing
draws from a generator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llada_mega.config.schema import Config
from llada_mega.data.batch import Batch
from llada_mega.data.loader import BatchOptions, stage_batch
from llada_mega.data.sample import Sample
from llada_mega.diffusion.curriculum import Curriculum, ResolvedStage
from llada_mega.errors import TrainingError
from llada_mega.training.resume import sharded_training_state
from llada_mega.training.step import TrainStep

ALMOST_ALL = 1.0 - 1e-6  # noise level at which nearly every token has a logit row


def dry_run(step: TrainStep, config: Config, curriculum: Curriculum, options: BatchOptions) -> ResolvedStage:
    """Run the largest batch through the model. A collective.

    Returns:
        the stage that it stands for.
    Raises:
        TrainingError: it does not fit; says what to change.
    """
    stage, batch = largest_batch(config, curriculum, options)
    per_step = config.trainer.global_batch_size // (config.trainer.micro_batch_size * step.groups.dp.size())
    # So many micro-batches are under way at once in a pipeline; more of them need no more memory.
    count = min(per_step, 2 * config.parallel.pp) if config.parallel.pp > 1 else 1
    kept = [_extra_states(model) for model in step.bare_models]
    try:
        sharded_training_state(step)  # the optimizer would make its moments in the first step: room for them, too
        step([batch] * count, learning_rate=0.0, embedding_noise_std=1e-6, accept=lambda _: False)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not _is_out_of_memory(error):
            raise
        raise TrainingError(
            f"stage {stage.name} (block size {stage.block_size}) does not fit into memory: a micro-batch of "
            f"{batch.input_ids_S.numel()} positions with {batch.num_rows} logit rows ended in "
            f"'{str(error).splitlines()[0]}'; lower trainer.micro_batch_size, raise parallel.tp, pp or cp, or set "
            "parallel.recompute"
        ) from error
    for model, states in zip(step.bare_models, kept, strict=True):
        for name, state in states.items():
            model.get_submodule(name).set_extra_state(state)
    return stage


def largest_batch(config: Config, curriculum: Curriculum, options: BatchOptions) -> tuple[ResolvedStage, Batch]:
    """The stage whose micro-batch has the most positions, and it: whole documents, almost every token masked."""
    candidates = []
    for stage in curriculum.stages:
        samples = [_one_document(stage.sequence_length, index) for index in range(config.trainer.micro_batch_size)]
        candidates.append((stage, stage_batch(samples, stage, options, t_min=ALMOST_ALL, t_max=1.0)))
    return max(candidates, key=lambda candidate: candidate[1].input_ids_S.numel())


def _extra_states(model: nn.Module) -> dict[str, Any]:
    """Module name -> what ``get_extra_state`` says of it; only of modules that have any."""
    states = {}
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            state = module.get_extra_state()
            if state is not None:
                states[name] = state
    return states


def _one_document(length: int, index: int) -> Sample:
    return Sample(
        torch.zeros(length, dtype=torch.int64), [length], [False], torch.ones(length, dtype=torch.bool), index
    )


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
