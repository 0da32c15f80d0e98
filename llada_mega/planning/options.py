"""Keys of ``plan``: everything that a run has, and what the run does not know: the hardware and how well it is used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from llada_mega.config.schema import Config


@dataclass
class Assumptions:
    """What nobody knows before the run. Shares are of the published peak; measure yours and give them here.

    The values are round guesses, not measurements.
    """

    document_length: Optional[int] = None  # tokens; null: every sample is one document, the dearest case
    expert_load: float = 1.2  # tokens of the fullest expert-parallel rank over the mean
    linear_efficiency: float = 0.6  # share of the peak FLOP/s in large matrix products
    expert_efficiency: float = 0.4  # share of the peak FLOP/s in the routed experts
    attention_efficiency: float = 0.4  # share of the peak FLOP/s in attention, over live tiles of 128 x 128
    memory_efficiency: float = 0.6  # share of the memory bandwidth in norms, activations, residuals, the optimizer
    link_efficiency: float = 0.7  # share of the bandwidth of links inside a node and of the network
    overlapped: float = 0.8  # share of gradient and weight traffic that parallel.overlap hides
    reserved_gib: float = 6.0  # of device memory: CUDA context, NCCL buffers, workspaces, fragmentation
    process_gib: float = 4.0  # host memory of a rank's process: interpreter, libraries, the host side of CUDA and NCCL
    worker_gib: float = 0.25  # host memory of a data worker, of which each rank has data.num_workers


@dataclass
class HardwareOptions:
    """A device of the table, and changes to it; null: as the table says."""

    device: str = "h100"  # h100 | h200 | b200 | gb200
    memory_gib: Optional[float] = None
    peak_tflops: Optional[float] = None  # dense, in trainer.dtype
    memory_gb_per_s: Optional[float] = None
    link_gb_per_s: Optional[float] = None  # one direction, between devices of a node
    network_gb_per_s: Optional[float] = None  # one direction, of each device
    node_size: Optional[int] = None  # devices that the fast links join
    host_size: Optional[int] = None  # devices of one host, whose memory their processes share


@dataclass
class PlanOptions(Config):
    """The configuration of a run and the keys of ``plan``."""

    gpus: Optional[int] = None  # devices; null: the fewest on which the run fits
    hardware: HardwareOptions = field(default_factory=HardwareOptions)
    assume: Assumptions = field(default_factory=Assumptions)
    search: bool = False  # try other layouts on the same devices and list the fastest that fit
    top: int = 10  # layouts that a search lists
    output: Optional[str] = None  # also write everything as JSON to this file
