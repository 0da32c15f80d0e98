"""Parameter names and shards: from this rank's names and slices to those of the whole model, and back.

The whole model's names are the ``state_dict`` names of a single process with Megatron's own modules: layers and experts
counted globally, norms apart from linear layers. TransformerEngine's modules hold some tensors under other names.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from llada_mega.config.model import ModelConfig
from llada_mega.models.layer_spec import ATTENTION_NORM, DENSE_NORM, layer_offset
from llada_mega.models.model import BlockDiffusionModel

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\.)")
_EXPERT = re.compile(r"(\.local_experts\.)(\d+)(\.)")
_GROUPED_EXPERT = re.compile(r"(\.experts\.)(linear_fc[12]\.weight)(\d+)$")
_COLUMN_PARALLEL = re.compile(r"\.(linear_qkv\.(weight|bias)|linear_fc1\.weight)$")
_ROW_PARALLEL = re.compile(r"\.(linear_proj|linear_fc2)\.weight$")
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
        for separate, fused in (ATTENTION_NORM, DENSE_NORM):
            name = name.replace(fused, separate)
        name = _GROUPED_EXPERT.sub(r"\1local_experts.\3.\2", name)
        name = _LAYER.sub(lambda match: f"{match[1]}{int(match[2]) + first_layer}{match[3]}", name)
        return _EXPERT.sub(lambda match: f"{match[1]}{int(match[2]) + first_expert}{match[3]}", name)

    return {name: whole(name) for name in model.state_dict() if not name.endswith("_extra_state")}


def checkpoint_key(config: ModelConfig, name: str) -> tuple[str, int | None]:
    """The key of a whole tensor in a checkpoint: the name that TransformerEngine's layer spec gives it.

    All experts of a layer share a key, with an axis for the expert in front.

    Args:
        name: in the whole model, as :func:`global_names` gives it.
    Returns:
        the key, and the index on the expert axis (None when the tensor has no such axis).
    """
    expert = _EXPERT.search(name)
    if expert is not None:
        return _EXPERT.sub(".experts.", name), int(expert[2])
    layer = _LAYER.match(name)
    if layer is not None:
        fused = (ATTENTION_NORM,) if config.is_moe_layer(int(layer[2])) else (ATTENTION_NORM, DENSE_NORM)
        for separate, together in fused:
            name = name.replace(separate, together)
    return name, None


def local_slice(model: BlockDiffusionModel, name: str, parameter: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of the tensor ``whole``, in the shape of ``parameter``.

    ``whole`` may have fewer vocabulary rows than the padded table: the missing rows are zero.

    Args:
        name: the tensor's name in the whole model.
        parameter: this rank's parameter or buffer.
        whole: the same tensor of the whole model.
    """
    dimension, group = split_dimension(name), tensor_parallel_group(model, name)
    if is_vocabulary(name):
        missing = parameter.shape[0] * group.size() - whole.shape[0]
        if missing:
            whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
    if group.size() == 1 or dimension is None:
        return whole
    if name.endswith("linear_fc1.weight"):  # [gate; up], each split over the ranks
        gate, up = whole.chunk(2)
        return torch.cat([half.chunk(group.size())[group.rank()] for half in (gate, up)])
    return whole.chunk(group.size(), dim=dimension)[group.rank()]


def split_dimension(name: str) -> int | None:
    """The dimension that tensor parallelism splits, from the name in the whole model; None: every rank has all.

    Not from Megatron's attributes of the parameter: TransformerEngine's grouped experts lack them.
    """
    if is_vocabulary(name) or _COLUMN_PARALLEL.search(name):
        return 0
    return 1 if _ROW_PARALLEL.search(name) else None


def tensor_parallel_group(model: BlockDiffusionModel, name: str) -> ProcessGroup:
    """The ranks that share the tensor with this name in the whole model."""
    return model.groups.expt_tp if ".local_experts." in name else model.groups.tp


def is_vocabulary(name: str) -> bool:
    """True for the tables with one row a token, which are padded."""
    return name in (_EMBEDDING, _OUTPUT)
