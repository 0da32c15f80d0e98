"""AdamW's state in checkpoints: exact under every layout, with and without the distributed optimizer."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from llada_mega.checkpoint.optimizer_state import boxes
from llada_mega.checkpoint.storage import ShardReader
from llada_mega.config.model import ModelConfig
from llada_mega.config.run import ParallelConfig
from tests.models.helpers import MASK_ID, dense_config, moe_config
from tests.parallel.harness import run_ranks

SHAPE = {"num_layers": 4, "mask_token_id": MASK_ID}
MODELS = {"moe": moe_config(**SHAPE), "tied": dense_config("llama", tie_embeddings=True, **SHAPE)}
DISTRIBUTED = {"distributed_optimizer": True}
UPDATES = 7


@pytest.mark.parametrize("shape", [(5,), (3, 4), (1, 3), (3, 1), (2, 3, 2)])
def test_boxes_are_the_range_in_order(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    whole = torch.arange(size).reshape(shape)
    for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
        found = list(boxes(start, stop, shape))
        parts = [whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))] for box in found]
        assert len(found) <= 2 * len(shape) - 1
        assert [index for part in parts for index in part.flatten().tolist()] == list(range(start, stop))


def copy_checkpoint(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, source: Path | None, target: Path
) -> list[float]:
    """Load a checkpoint under one layout and write it again; without a source, one of random values.

    Returns every parameter's count of updates.
    """
    import torch.distributed as dist

    from llada_mega.checkpoint.save import CheckpointWrite
    from llada_mega.config.training import OptimizerConfig
    from llada_mega.models import build_model
    from llada_mega.parallel import initialize
    from llada_mega.training.optimizer import build_optimizer, wrap_data_parallel
    from llada_mega.training.resume import restore, sharded_training_state
    from llada_mega.training.step import TrainStep

    groups = initialize(parallel)
    stages = [None] if parallel.vp is None else range(parallel.vp)
    models = [build_model(model, parallel=parallel, dtype=dtype, vp_stage=stage) for stage in stages]
    chunks = wrap_data_parallel(models, parallel)
    optimizer = build_optimizer(OptimizerConfig(), chunks, parallel, dtype)
    step = TrainStep(chunks, optimizer, groups, seed=1, device=groups.device)
    if source is None:
        for shard in sharded_training_state(step)["optimizer"].values():
            shard.data.copy_(torch.rand(shard.local_shape))
    else:
        restore(step, source, {"optimizer": {"step": UPDATES}, "callbacks": {}, "train": {}}, [])
    write = CheckpointWrite(target, rank=groups.rank, world_size=groups.world_size)
    write.start(sharded_training_state(step))
    dist.barrier()
    write.write()
    dist.barrier()
    write.finish(model, {})
    parts = [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
    return [float(entry["step"]) for part in parts for entry in part.optimizer.state.values()]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "model,path",
    [
        ("moe", [(2, DISTRIBUTED), (2, {"tp": 2, "sp": True}), (2, {"ep": 2, **DISTRIBUTED}), (2, {"pp": 2, "vp": 2})]),
        ("tied", [(2, {"pp": 2}), (3, DISTRIBUTED), (2, {"tp": 2, **DISTRIBUTED}), (2, {"cp": 2, **DISTRIBUTED})]),
    ],
)
def test_nothing_is_lost_on_the_way_through_layouts(
    tmp_path: Path, model: str, path: list[tuple[int, dict]], dtype: torch.dtype
) -> None:
    """Weights, both moments and fp32 weights come back bit for bit, whichever ranks held them in between."""
    source = tmp_path / "step_0"
    run_ranks(
        copy_checkpoint, 1, model=MODELS[model], parallel=ParallelConfig(), dtype=dtype, source=None, target=source
    )
    first = ShardReader(source)
    names = {key.split(".")[2] for key in first.index if key.startswith("optimizer.state.")}
    assert names == {"exp_avg", "exp_avg_sq"} | ({"fp32_param"} if dtype == torch.bfloat16 else set())
    for leg, (world_size, sizes) in enumerate([*path, (1, {})], start=1):
        target = tmp_path / f"step_{leg}"
        steps = run_ranks(
            copy_checkpoint,
            world_size,
            model=MODELS[model],
            parallel=ParallelConfig(**sizes),
            dtype=dtype,
            source=source,
            target=target,
        )
        assert {step for rank in steps for step in rank} == {UPDATES}
        source = target
    last = ShardReader(source)
    assert last.index.keys() == first.index.keys()
    for key in first.index:
        assert torch.equal(last.read_whole(key), first.read_whole(key)), key
