"""A real Slurm for the tests of this directory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster, obstacle


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    """Two idle nodes; skips where Slurm is not installed."""
    if (reason := obstacle()) is not None:
        pytest.skip(reason)
    parent = Path(tempfile.mkdtemp(prefix="slurm_", dir="/tmp"))  # pytest's own paths are too long for a socket
    parent.chmod(0o755)
    started = SlurmCluster(parent / "c")
    try:
        started.start()
        yield started
    finally:
        started.stop()
        shutil.rmtree(parent, ignore_errors=True)
