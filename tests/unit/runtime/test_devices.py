"""Which GPU is a rank's own, who is warned of fp32, and peak speeds by the names that devices give."""

from __future__ import annotations

import pytest
import torch

from distllm.config.problems import UserError
from distllm.layout.tree import Tree
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


@pytest.mark.parametrize(
    ("local_rank", "ranks_on_node", "num_visible", "expected"),
    [
        pytest.param(0, 1, 1, 0, id="one of one"),
        pytest.param(5, 8, 8, 5, id="its own of eight"),
        pytest.param(1, 2, 8, 1, id="more GPUs than ranks"),
        pytest.param(5, 8, 1, 0, id="the launcher shows each rank its own"),
    ],
)
def test_a_rank_s_gpu(local_rank: int, ranks_on_node: int, num_visible: int, expected: int) -> None:
    assert devices.device_index(local_rank, ranks_on_node, num_visible) == expected


def test_too_few_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="start at most 4 ranks on this node"):
        devices.device_index(1, 8, 4)


def test_two_ranks_on_one_gpu_are_refused() -> None:
    """The second visitor of a GPU tells of itself; of several ranks see tests/ranks/test_runtime.py."""
    devices.refuse_late_visitors(1, 0, Tree())
    with pytest.raises(UserError, match=r"ranks \[3\] share a GPU"):
        devices.refuse_late_visitors(2, 3, Tree())


def test_fp32_on_a_gpu_is_warned_of() -> None:
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert "train.precision=bf16" in str(devices.warning_of_precision(cuda, "fp32"))
    assert devices.warning_of_precision(cuda, "bf16") is None
    assert devices.warning_of_precision(cpu, "fp32") is None
