"""Peak speed of devices by name, for model FLOPs utilisation (MFU)."""

from __future__ import annotations

import torch

# Dense bf16 FLOP/s with fp32 accumulation, from NVIDIA's datasheets; the first name that matches counts.
PEAK_BF16_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the peak FLOP/s of one device; None where no figure is known: then there is no MFU."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device))


def peak_flops_by_name(name: str) -> float | None:
    return next((peak for known, peak in PEAK_BF16_FLOPS.items() if known in name), None)
