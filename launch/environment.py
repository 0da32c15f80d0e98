"""Environment variables of the training processes, by fabric and hardware.

What a user has set stays: a preset is a default. ``NCCL_*`` and ``TORCH_*`` are described in the documentation of NCCL
and of PyTorch's NCCL process group, ``FI_*`` in that of libfabric's EFA provider, the values of ``gcp`` in Google's
guide to its gIB plugin, ``CUDA_DEVICE_MAX_CONNECTIONS`` in Megatron-Core's. What is best for this training was measured
on none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.hardware import Hardware

FABRICS = ("single_node", "infiniband", "roce", "efa", "gcp", "ethernet")
_BLACKWELL = 10


@dataclass(frozen=True)
class Job:
    """What the environment depends on besides the node."""

    nodes: int
    processes: int  # a node
    tensor_parallel: bool
    overlap: bool
    log_dir: Path


def choose_fabric(hardware: Hardware, nodes: int) -> str:
    """The fabric that ``FABRIC=auto`` means."""
    if nodes == 1:
        return "single_node"
    if hardware.cloud:
        return {"aws": "efa", "gcp": "gcp"}[hardware.cloud]
    layers = set(hardware.rdma.values())
    return "infiniband" if "InfiniBand" in layers else "roce" if "Ethernet" in layers else "ethernet"


def environment(fabric: str, hardware: Hardware, job: Job, given: Mapping[str, str]) -> dict[str, str]:
    """The variables to add for the training processes.

    Args:
        fabric: one of :data:`FABRICS`, or ``auto``.
        given: variables that are set already; they are left out.
    Raises:
        ValueError: there is no such fabric.
    """
    if fabric == "auto":
        fabric = choose_fabric(hardware, job.nodes)
    if fabric not in FABRICS:
        raise ValueError(f"FABRIC={fabric} is unknown; use auto, {', '.join(FABRICS)}")
    variables = {"FABRIC": fabric, "OMP_NUM_THREADS": str(max(1, hardware.cpus // job.processes))}
    if hardware.gpus:
        variables |= _every_gpu(hardware, job) | _network(fabric, hardware)
    return {name: value for name, value in sorted(variables.items()) if name == "FABRIC" or name not in given}


def _every_gpu(hardware: Hardware, job: Job) -> dict[str, str]:
    variables = {
        # Micro-batches differ in length; without this their buffers leave holes.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # The last collectives of every rank. The watchdog writes them (RUN/logs/hang), and where its patience is longer
        # than NCCL's timeout, NCCL does, where the logs are.
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(job.log_dir / "nccl_trace_rank_"),
    }
    if connections := device_connections(hardware.gpu_architecture, job.tensor_parallel, job.overlap):
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = connections
    return variables


def device_connections(architecture: int, tensor_parallel: bool, overlap: bool) -> str | None:
    """``CUDA_DEVICE_MAX_CONNECTIONS``: hardware queues between host and GPU; None leaves CUDA's default of 8.

    Up to Hopper, Megatron-Core's tensor parallelism overlaps its collectives by launching them before the product that
    they hide behind, which only one queue keeps in that order. Where nothing asks for the order, and on Blackwell,
    overlapped streams should not queue behind each other.
    """
    if architecture >= _BLACKWELL:
        return "32"
    if tensor_parallel:
        return "1"
    return "32" if overlap else None


def _network(fabric: str, hardware: Hardware) -> dict[str, str]:
    match fabric:
        case "infiniband":
            # Named, so that NCCL fails instead of falling back to sockets, and leaves Ethernet ports of storage alone.
            return {"NCCL_NET": "IB", **_devices(hardware, "InfiniBand")}
        case "roce":
            return {
                "NCCL_NET": "IB",
                **_devices(hardware, "Ethernet"),
                "NCCL_IB_QPS_PER_CONNECTION": "4",  # several flows, so that routers can spread them
                "NCCL_IB_TC": "106",  # DSCP 26 with ECN, the usual lossless class; ask the network's owner
            }
        case "efa":
            return {
                "FI_PROVIDER": "efa",
                "FI_EFA_USE_DEVICE_RDMA": "1",  # needed on P4d, harmless after it
                "FI_EFA_FORK_SAFE": "1",  # data loader workers are forked while memory is registered
            }
        case "gcp":
            return {  # gIB on A3 Ultra and later
                "NCCL_NET": "gIB",
                "NCCL_CROSS_NIC": "0",
                "NCCL_NET_GDR_LEVEL": "PIX",
                "NCCL_P2P_NET_CHUNKSIZE": "131072",
                "NCCL_NVLS_CHUNKSIZE": "524288",
                "NCCL_IB_ADAPTIVE_ROUTING": "1",
                "NCCL_IB_QPS_PER_CONNECTION": "4",
                "NCCL_IB_TC": "52",
                "NCCL_IB_FIFO_TC": "84",
            }
        case "ethernet":
            return {"NCCL_NET": "Socket"}
    return {}


def _devices(hardware: Hardware, layer: str) -> dict[str, str]:
    names = [name for name, found in hardware.rdma.items() if found == layer]
    return {"NCCL_IB_HCA": "=" + ",".join(names)} if names else {}
