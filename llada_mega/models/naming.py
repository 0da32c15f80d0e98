"""Parameter names and shards: from this rank's names and slices to those of the whole model, and back.

The whole model's names are the ``state_dict`` names of a single process: layers and experts counted globally.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from llada_mega.models.layer_spec import layer_offset
from llada_mega.models.model import BlockDiffusionModel

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\.)")
_EXPERT = re.compile(r"(\.local_experts\.)(\d+)(\.)")
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def global_names(model: BlockDiffusionModel) -> dict[str, str]:
    """Map every ``state_dict`` name of this rank to the name in the whole model.

    The last pipeline stage of a model with tied tables holds a copy of the embedding table: it has that name.
    """
    config, groups = model.config, model.groups
    first_layer = layer_offset(config, groups.pp.rank(), model.vp_stage)
    first_expert = (config.num_moe_experts or 0) // groups.ep.size() * groups.ep.rank()

    def whole(name: str) -> str:
        if name == _OUTPUT and model.model_config.tie_embeddings:
            return _EMBEDDING
        name = _LAYER.sub(lambda match: f"{match[1]}{int(match[2]) + first_layer}{match[3]}", name)
        return _EXPERT.sub(lambda match: f"{match[1]}{int(match[2]) + first_expert}{match[3]}", name)

    return {name: whole(name) for name in model.state_dict() if not name.endswith("_extra_state")}


def local_slice(model: BlockDiffusionModel, name: str, parameter: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of the tensor ``whole``, in the shape of ``parameter``.

    ``whole`` may have fewer vocabulary rows than the padded table: the missing rows are zero.

    Args:
        name: the tensor's name in the whole model.
        parameter: this rank's parameter or buffer, with Megatron's tensor-parallel attributes.
        whole: the same tensor of the whole model.
    """
    is_expert = ".local_experts." in name
    group = model.groups.expt_tp if is_expert else model.groups.tp
    if is_vocabulary(name):
        missing = parameter.shape[0] * group.size() - whole.shape[0]
        if missing:
            whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
    if group.size() == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return whole
    if name.endswith("linear_fc1.weight"):  # [gate; up], each split over the ranks
        gate, up = whole.chunk(2)
        return torch.cat([half.chunk(group.size())[group.rank()] for half in (gate, up)])
    return whole.chunk(group.size(), dim=parameter.partition_dim)[group.rank()]  # type: ignore[attr-defined]


def is_vocabulary(name: str) -> bool:
    """True for the tables with one row a token, which are padded."""
    return name in (_EMBEDDING, _OUTPUT)
