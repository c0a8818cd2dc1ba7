"""The settings of the machine that a job is planned for."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from distllm.config.data_schema import STRICT, PositiveInt

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=STRICT)
class Cluster:
    """The machine that a job is planned for: `check` and `train` refuse what its devices cannot hold.

    device: name of the device; None means that nothing is compared. On `cpu` what only a GPU needs counts 0.
    memory_gib: GiB of one device, as its driver reports them to a process; on a CPU the share of one rank.
        None means that nothing is compared.
    gpus_per_node: devices of one node.
    bf16_tflops: peak TFLOP/s of dense products in bf16. None: not known.
    memory_tb_per_s: TB/s between a device and its memory. None: not known.
    nvlink_gb_per_s: GB/s from a device to the others of its node, one way. None: not known.
    network_gb_per_s: GB/s from a device to other nodes, one way. None: not known.
    """

    device: str | None = None
    memory_gib: PositiveFloat | None = None
    gpus_per_node: PositiveInt = 8
    bf16_tflops: PositiveFloat | None = None
    memory_tb_per_s: PositiveFloat | None = None
    nvlink_gb_per_s: PositiveFloat | None = None
    network_gb_per_s: PositiveFloat | None = None

    @property
    def memory_bytes(self) -> int | None:
        """Return the bytes that a rank must not exceed; None where nothing is compared."""
        return None if self.device is None or self.memory_gib is None else int(self.memory_gib * 2**30)
