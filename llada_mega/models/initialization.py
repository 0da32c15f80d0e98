"""Initial weights that do not depend on how the model is split.

Every matrix is drawn whole, from a generator seeded with (seed, the parameter's name in the whole model), and sliced.
So one seed gives one model on one kind of device, under every layout; a layout with tp ranks does tp times the work.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from llada_mega.models.model import BlockDiffusionModel
from llada_mega.models.naming import (
    global_names,
    is_vocabulary,
    local_slice,
    split_dimension,
    tensor_parallel_group,
)


@torch.no_grad()
def initialize_weights(model: BlockDiffusionModel, seed: int) -> None:
    """Matrices from N(0, init_std), norms 1, biases 0, padded vocabulary rows 0."""
    names = global_names(model)
    for local_name, parameter in model.named_parameters():
        name = names[local_name]
        if name.endswith("bias"):
            parameter.zero_()
        elif "layernorm" in name:
            parameter.fill_(1.0)
        else:
            parameter.copy_(local_slice(model, name, parameter, _draw(model, name, parameter, seed)))


def _draw(model: BlockDiffusionModel, name: str, parameter: Tensor, seed: int) -> Tensor:
    shape = list(parameter.shape)
    dimension = split_dimension(name)
    if dimension is not None:
        shape[dimension] *= tensor_parallel_group(model, name).size()
    if is_vocabulary(name):
        shape[0] = model.model_config.vocab_size
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device=parameter.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    draw = torch.empty(shape, dtype=torch.float32, device=parameter.device)
    return draw.normal_(0.0, model.model_config.init_std, generator=generator)
