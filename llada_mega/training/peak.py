"""What a device could do at most: the denominator of model FLOPs utilisation (MFU)."""

from __future__ import annotations

import torch

# TFLOP/s of dense matrix products, from the vendor's data sheets (halved where they count sparsity). The first name
# that the device's name contains counts, so the longer ones come first. float32 is what PyTorch does unless it is
# allowed TF32 (`torch.set_float32_matmul_precision`).
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "GB200": {"bfloat16": 2500, "tf32": 1250, "float32": 80},
    "B200": {"bfloat16": 2250, "tf32": 1125, "float32": 75},
    "GH200": {"bfloat16": 989, "tf32": 494, "float32": 67},
    "H200 NVL": {"bfloat16": 835, "tf32": 417, "float32": 60},
    "H200": {"bfloat16": 989, "tf32": 494, "float32": 67},
    "H100 NVL": {"bfloat16": 835, "tf32": 417, "float32": 60},
    "H100 PCIe": {"bfloat16": 756, "tf32": 378, "float32": 51},
    "H100": {"bfloat16": 989, "tf32": 494, "float32": 67},
    "A100": {"bfloat16": 312, "tf32": 156, "float32": 19.5},
    "L40S": {"bfloat16": 362, "tf32": 183, "float32": 91.6},
}


def peak_flops(dtype: str, given_tflops: float | None = None) -> float | None:
    """FLOP/s of this process's device.

    Args:
        dtype: of the matrix products: bfloat16 or float32.
        given_tflops: ``logging.peak_tflops``, which goes before the table and is all that a CPU has.

    Returns:
        None when nobody knows.
    """
    if given_tflops is not None:
        return given_tflops * 1e12
    if not torch.cuda.is_available():
        return None
    if dtype == "float32" and torch.get_float32_matmul_precision() != "highest":
        dtype = "tf32"
    return table_peak(torch.cuda.get_device_name(), dtype)


def table_peak(device_name: str, dtype: str) -> float | None:
    """FLOP/s that the table has for a device's name as its driver gives it, or None."""
    rates = next((rates for name, rates in PEAK_TFLOPS.items() if name in device_name), {})
    return rates[dtype] * 1e12 if dtype in rates else None
