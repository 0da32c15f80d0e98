"""Build a model: the one door to this package."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from llada_mega.errors import CheckpointError
from llada_mega.models.config import build_transformer_config
from llada_mega.models.initialization import initialize_weights
from llada_mega.models.model import BlockDiffusionModel
from llada_mega.models.naming import global_names, local_slice
from llada_mega.parallel import ParallelGroups, cpu_runtime, ensure_single_process


def build_model(
    config: ModelConfig,
    *,
    parallel: ParallelConfig | None = None,
    dtype: torch.dtype = torch.float32,
    fp8: str | None = None,
    seed: int | None = 1234,
    pre_process: bool | None = None,
    post_process: bool | None = None,
    groups: ParallelGroups | None = None,
    vp_stage: int | None = None,
) -> BlockDiffusionModel:
    """This rank's part of the model (one chunk of it under virtual pipeline parallelism).

    Args:
        config: shape of the model.
        parallel: default, that of ``groups``.
        dtype: of parameters and activations.
        fp8: recipe of the layers' matrix products (``llada_mega.config.fp8``); default, they are in ``dtype``.
        seed: of the initial weights; None leaves them uninitialised, for a model that is loaded next.
        pre_process: holds the embedding; default, by the pipeline rank.
        post_process: holds the output layer; default, by the pipeline rank.
        groups: default, those of this process (one process alone when there are none).
        vp_stage: index of the model chunk.

    Raises:
        ConfigError: the shape cannot be built or split.
    """
    cpu_runtime.install()
    groups = groups if groups is not None else ensure_single_process()
    parallel = parallel if parallel is not None else groups.config
    first_chunk, last_chunk = vp_stage in (None, 0), vp_stage is None or vp_stage == (parallel.vp or 1) - 1
    model = BlockDiffusionModel(
        config,
        build_transformer_config(config, parallel, dtype, fp8),
        groups,
        pre_process=groups.is_first_stage and first_chunk if pre_process is None else pre_process,
        post_process=groups.is_last_stage and last_chunk if post_process is None else post_process,
        vp_stage=vp_stage,
    )
    _reduce_experts_over_their_ranks(model)
    if seed is not None:
        initialize_weights(model, seed)
    # Tied tables: marks the shared parameter and, across pipeline stages, makes the two copies equal.
    model.setup_embeddings_and_output_layer()
    return model


def _reduce_experts_over_their_ranks(model: BlockDiffusionModel) -> None:
    """Make Megatron sum the experts' gradients over ``expt_dp``, also where experts are copied instead of split.

    It does so under expert parallelism only. Under tensor parallelism without it (ep = etp = 1) each rank has all
    experts and a part of the tokens, and Megatron would leave the tensor-parallel ranks with different gradients.
    """
    if model.groups.expt_dp.size() != model.groups.dp_cp.size():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.allreduce = False


@torch.no_grad()
def load_tensors(model: BlockDiffusionModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole tensors, under the names of a single-process ``state_dict``, into this rank's part of ``model``.

    Tensors that other pipeline stages or expert ranks hold are skipped. Vocabulary tensors may have fewer rows than the
    padded table (the rest becomes zero).

    Raises:
        CheckpointError: a tensor has the wrong shape, is unknown (seen where one rank holds all layers and experts), or
            one of the model's is missing.
    """
    holds_all = model.pre_process and model.post_process and model.groups.ep.size() == 1
    state = model.state_dict(keep_vars=True)
    here = {whole: state[local] for local, whole in global_names(model).items()}
    missing = set(here)
    for name, whole in tensors:
        target = here.get(name)
        if target is None:
            if holds_all:
                raise CheckpointError(f"tensor {name} has no place in this model; check the model configuration")
            continue
        part = local_slice(model, name, target, whole)
        if part.shape != target.shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(part.shape)}, the model wants {list(target.shape)}; "
                f"check that the checkpoint and the model configuration belong together"
            )
        target.copy_(part)
        missing.discard(name)
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing, the first is {min(missing)}")
