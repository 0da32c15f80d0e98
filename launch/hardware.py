"""What a node has, as far as the environment of a run depends on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

_PCI_AMAZON = "0x1d0f"
_ASK_TORCH = """
import json, torch
print(json.dumps([torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]))
"""


@dataclass(frozen=True)
class Hardware:
    """One node.

    Attributes:
        gpu_architecture: major compute capability of its GPUs (9 Hopper, 10 and 12 Blackwell); 0 without GPUs.
        gpus: how many PyTorch can use.
        cpus: cores that this process may use.
        rdma: active RDMA devices and their link layer: ``{"mlx5_0": "InfiniBand", "mlx5_4": "Ethernet"}``.
        cloud: "aws" or "gcp" when its network is that provider's own, else "".
    """

    gpu_architecture: int = 0
    gpus: int = 0
    cpus: int = 1
    rdma: dict[str, str] = field(default_factory=dict)
    cloud: str = ""


class UnfitNodeError(ValueError):
    """This node lacks something that the job was given."""


def find_hardware(sys_root: Path = Path("/sys")) -> Hardware:
    """Look at this node. GPUs are what PyTorch says: a job's variables also name GPUs that it cannot use.

    Raises:
        ValueError: PyTorch cannot be asked.
    """
    # In a process of its own: asking makes a CUDA context, which would stay beside the training.
    asked = subprocess.run([sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, check=False)
    if asked.returncode:
        cause = (asked.stderr.strip().splitlines() or [f"status {asked.returncode}"])[-1]
        raise ValueError(f"PyTorch cannot be asked for GPUs: {cause}")
    capabilities = json.loads(asked.stdout.splitlines()[-1])
    return Hardware(
        gpu_architecture=min((major for major, _ in capabilities), default=0),
        gpus=len(capabilities),
        cpus=len(os.sched_getaffinity(0)),
        rdma=rdma_devices(sys_root),
        cloud=cloud(sys_root),
    )


def rdma_devices(sys_root: Path) -> dict[str, str]:
    """Devices with an active port, and the link layer of that port."""
    found = {}
    for device in sorted((sys_root / "class/infiniband").glob("*"), key=lambda path: (len(path.name), path.name)):
        for port in sorted(device.glob("ports/*")):
            if "ACTIVE" in _read(port / "state"):
                found[device.name] = _read(port / "link_layer")
    return found


def cloud(sys_root: Path) -> str:
    """Whose network this is: Amazon's EFA is an RDMA device of theirs, Google names its machines."""
    vendors = {_read(path) for path in (sys_root / "class/infiniband").glob("*/device/vendor")}
    if _PCI_AMAZON in vendors:
        return "aws"
    product = _read(sys_root / "class/dmi/id/product_name")
    return "gcp" if "Google" in product and (sys_root / "class/infiniband").exists() else ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
