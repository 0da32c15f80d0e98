"""Runs on every rank of a layout: load a checkpoint and save it from there; convert a share of one."""

from __future__ import annotations

from pathlib import Path

import torch

from llada_mega.config.run import ParallelConfig


def reshard(source: str, target: str, tp: int, pp: int, ep: int) -> None:
    """Load a checkpoint into this rank of a layout and save it from there."""
    from llada_mega.checkpoint.checkpoint import load_model_weights, model_state, read_model_config
    from llada_mega.checkpoint.save import CheckpointWrite
    from llada_mega.models import build_model
    from llada_mega.parallel import initialize

    parallel = ParallelConfig(tp=tp, sp=tp > 1, pp=pp, ep=ep)
    groups = initialize(parallel)
    config = read_model_config(Path(source))
    model = build_model(config, parallel=parallel, dtype=torch.bfloat16, seed=None)
    load_model_weights(Path(source), model)
    write = CheckpointWrite(Path(target), rank=groups.rank, world_size=groups.world_size)
    write.start({"model": model_state([model])})
    torch.distributed.barrier()
    write.write()
    torch.distributed.barrier()
    write.finish(config, {})
    torch.distributed.barrier()


def convert_both_ways(source: str, checkpoint: str, exported: str, mask_token_id: int) -> int:
    """Import and export with all processes; returns the bytes that this one wrote."""
    from llada_mega.checkpoint.convert import export_model, import_model
    from llada_mega.parallel.workers import Workers

    workers, written = Workers.from_launcher(), 0

    def count(total_bytes: int):
        def advance(size: int) -> None:
            nonlocal written
            written += size

        return advance

    import_model(Path(source), Path(checkpoint), mask_token_id=mask_token_id, workers=workers, progress=count)
    export_model(Path(checkpoint), Path(exported), max_shard_size="40KB", workers=workers, progress=count)
    return written
