"""Peak speeds: the right one for the names that devices give themselves, none where it is not known."""

from __future__ import annotations

import pytest
import torch

from distllm.runtime import devices


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA A10", None),
    ],
)
def test_names_as_the_driver_gives_them(name: str, peak: float | None) -> None:
    """Dense bf16 figures of NVIDIA's datasheets, copied here a second time on purpose."""
    assert devices.peak_flops_by_name(name) == peak


def test_only_bf16_on_a_gpu_has_a_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert devices.peak_flops(torch.device("cuda", 0), "bf16") == 989e12
    assert devices.peak_flops(torch.device("cuda", 0), "fp32") is None
    assert devices.peak_flops(torch.device("cpu"), "bf16") is None
