"""Builds models with TransformerEngine's layers, without a GPU, and compares them with local ones: ``make te-check``.

Nothing is computed: parameters are on the meta device, other ranks do not exist. Compared are, on every rank of every
layout below, the sharded tensors (key, global shape, place in it, replica, dtype), the parameters' names in the whole
model and their shapes, and the sum of parameters with the closed form. ``--write`` records the keys in
``tests/models/te_keys.json``, with which the ordinary tests compare the local model.
"""

from __future__ import annotations

from tests.te import fake_cuda

fake_cuda.install()  # before anything asks for CUDA

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import megatron.core  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from llada_mega.config.compose import compose  # noqa: E402
from llada_mega.config.count import embedding_parameters, total_parameters  # noqa: E402
from llada_mega.config.model import ModelConfig  # noqa: E402
from llada_mega.config.run import ParallelConfig  # noqa: E402
from llada_mega.config.schema import Config  # noqa: E402
from llada_mega.models import BlockDiffusionModel, build_model  # noqa: E402
from llada_mega.models.config import padded_vocab_size  # noqa: E402
from llada_mega.models.hf_mapping import local_names  # noqa: E402
from llada_mega.models.naming import global_names  # noqa: E402
from llada_mega.parallel import destroy, groups, initialize  # noqa: E402
from llada_mega.parallel.capabilities import version  # noqa: E402
from tests.models.te_keys import KEY_FILE, MODELS, global_shapes, sharded_tensors  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Case:
    """A model under a layout, on all ranks of a world or on some of them."""

    name: str
    model: ModelConfig
    parallel: ParallelConfig
    world_size: int = 1
    ranks: tuple[int, ...] | None = None


def cases() -> Iterator[Case]:
    """Every kind of layer on one rank, every axis of parallelism on small models, the big models as they are run."""
    for name, model in MODELS.items():
        yield Case(name, model, ParallelConfig())
    dense, moe = dataclasses.replace(MODELS["qwen2"], num_layers=4), dataclasses.replace(MODELS["moe"], num_layers=4)
    yield Case("dense TP2", dense, ParallelConfig(tp=2), 2)
    yield Case("dense TP2 PP2 uneven", dense, ParallelConfig(tp=2, pp=2, num_layers_in_first_pipeline_stage=1), 4)
    yield Case("MoE TP2 SP", moe, ParallelConfig(tp=2, sp=True), 2)
    yield Case("MoE EP2 CP2", moe, ParallelConfig(ep=2, cp=2), 4)
    yield Case("MoE TP2 EP2 PP2", moe, ParallelConfig(tp=2, sp=True, ep=2, pp=2), 8)
    yield Case("MoE TP2 ETP2 EP2", moe, ParallelConfig(tp=2, sp=True, ep=2, etp=2), 4)
    yield Case("MoE PP2 VP2", moe, ParallelConfig(pp=2, vp=2), 2)
    for experiment in ("cpt_16b", "cpt_100b"):
        config = compose(Config, [f"experiment={experiment}"])
        parallel = config.parallel
        # ranks of one pipeline stage with one copy of every weight
        stage = math.lcm(parallel.tp * parallel.cp, parallel.etp * parallel.ep)
        first = [index * stage for index in range(parallel.pp)]
        yield Case(f"{experiment}, whole", config.model, ParallelConfig())
        yield Case(experiment, config.model, parallel, stage * parallel.pp, (*first, stage * parallel.pp - 1))


def build(case: Case, implementation: str) -> list[BlockDiffusionModel]:
    """This rank's chunks on the meta device."""
    model = dataclasses.replace(case.model, implementation=implementation)
    stages = range(case.parallel.vp) if case.parallel.vp else [None]
    with torch.device("meta"):
        return [
            build_model(model, parallel=case.parallel, dtype=torch.bfloat16, seed=None, vp_stage=stage)
            for stage in stages
        ]


def names_and_shapes(chunks: list[BlockDiffusionModel]) -> dict[str, tuple[int, ...]]:
    """Names in the whole model and local shapes of all tensors of this rank."""
    shapes = {}
    for chunk in chunks:
        state = chunk.state_dict(keep_vars=True)
        shapes |= {whole: tuple(state[local].shape) for local, whole in global_names(chunk).items()}
    return shapes


def check(case: Case) -> dict[str, list[int]]:
    """Global shapes by key over the ranks of ``case``. Raises AssertionError."""
    shapes: dict[str, list[int]] = {}
    for rank in case.ranks or range(case.world_size):
        with fake_cuda.world(rank, case.world_size):
            initialize(case.parallel)
            try:
                te, local = build(case, "te"), build(case, "local")
                layer = str(te[-1].decoder.layers[-1])
                kinds = (
                    "TERowParallelLinear",
                    "GroupedLinear" if case.model.is_moe else "LayerNormColumnParallelLinear",
                )
                assert all(kind in layer for kind in kinds), f"rank {rank}: these are other layers:\n{layer}"
                found, wanted = sharded_tensors(te), sharded_tensors(local)
                assert found == wanted, f"rank {rank}: sharded tensors differ: {sorted(found ^ wanted)[:6]}"
                names = names_and_shapes(te)
                assert names == names_and_shapes(local), f"rank {rank}: names or shapes differ"
                if case.world_size == 1:
                    known = set(local_names(case.model))
                    assert set(names) == known, f"not in both: {sorted(set(names) ^ known)[:6]}"
                shapes |= global_shapes(te)
            finally:
                destroy()
    total = sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith("expert_bias"))
    padding = padded_vocab_size(case.model.vocab_size, case.parallel.tp) - case.model.vocab_size
    total -= embedding_parameters(case.model) // case.model.vocab_size * padding
    assert total == total_parameters(case.model), f"{total} parameters, {total_parameters(case.model)} expected"
    return shapes


def main() -> int:
    """Checks all cases; 0 when all agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record the keys in tests/models/te_keys.json")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    groups._device = lambda: torch.device("meta")
    print(f"Megatron-Core {megatron.core.__version__}, TransformerEngine {version('transformer-engine')}")
    recorded, failures = {}, 0
    for case in cases():
        if options.only not in case.name:
            continue
        start = time.perf_counter()
        try:
            shapes = check(case)
            verdict = f"ok, {total_parameters(case.model):,} parameters, {len(shapes)} keys"
        except AssertionError as error:
            failures += 1
            verdict = f"FAILED: {error}"
        if case.name in MODELS:
            recorded[case.name] = dict(sorted(shapes.items()))
        print(f"{case.name:22} {time.perf_counter() - start:5.1f} s  {verdict}", flush=True)
    if options.write:
        KEY_FILE.write_text(json.dumps(recorded, indent=1) + "\n")
    elif not options.only and recorded != json.loads(KEY_FILE.read_text()):
        failures += 1
        print(f"FAILED: {Path(KEY_FILE).name} records other keys; look at the difference, then --write")
    return 1 if failures else 0


if __name__ == "__main__":
    assert not dist.is_initialized()
    sys.exit(main())
