"""Shared by all tests: one thread a process, no launcher's environment, GPU tests skipped where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), str(_ROOT / "kernels")])  # processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")
for _variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_variable, None)

if importlib.util.find_spec("transformer_engine"):  # before a test imports Megatron-Core, which would find it
    import llada_mega.parallel  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked ``gpu`` on a machine without CUDA."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch  # takes seconds: only when a GPU test was collected

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def no_process_groups_left() -> Iterator[None]:
    """Test files do not inherit each other's process groups."""
    yield
    groups = sys.modules.get("llada_mega.parallel.groups")
    if groups is not None:
        groups.destroy()


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with the indexed dataset ``corpus``."""
    import numpy as np

    from llada_mega.data.index_file import IndexWriter

    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    with IndexWriter("corpus", np.dtype(np.uint16)) as writer:
        for length in generator.integers(20, 300, 100).tolist():
            writer.add(generator.integers(1, 250, length).astype(np.uint16), [length])
        writer.finish()
    return tmp_path
