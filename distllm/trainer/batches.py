"""The microbatches of each step, read ahead of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from distllm.data.loader import StepShape, TrainingData
from distllm.data.mixture import Blend
from distllm.data.prefetch import Prefetcher
from distllm.data.sequences import Samples
from distllm.engine.microbatch import Microbatch
from distllm.engine.objective import Objective
from distllm.lineage.history import blends
from distllm.trainer.state import TrainState


@dataclass(frozen=True)
class _Request:
    """A request for the microbatches of the step that begins with this sample."""

    first_sample: int
    blends: list[Blend]


class Batches:
    """The microbatches of one data-parallel rank, on its device."""

    def __init__(
        self,
        training: TrainingData,
        shape: StepShape,
        dp_rank: int,
        objective: Objective,
        device: torch.device,
        prefetch: int,
    ) -> None:
        self._training = training
        self._shape = shape
        self._dp_rank = dp_rank
        self._objective = objective
        self._device = device
        self._prefetcher = Prefetcher(self._read, self._following, prefetch)

    def microbatches(self, state: TrainState) -> list[Microbatch]:
        """Return the microbatches of the next step; `state` is as `TrainState.planned` returns it."""
        return self._prefetcher.get(_Request(state.next_sample, blends(state.history)))

    def close(self) -> None:
        self._prefetcher.close()

    def _following(self, request: _Request) -> Iterator[_Request]:
        first = request.first_sample
        while True:
            first += self._shape.global_batch_size
            yield _Request(first, request.blends)

    def _read(self, request: _Request) -> list[Microbatch]:
        samples = self._training.microbatches(
            request.first_sample, request.blends, self._dp_rank, self._shape
        )
        return [to_microbatch(part, self._objective, self._device) for part in samples]


def to_microbatch(samples: Samples, objective: Objective, device: torch.device) -> Microbatch:
    """Make a microbatch of `samples` and begin to copy it to the device.

    The copy is from pinned memory: the host does not wait for it, only the kernels that read it do.
    """

    def move(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    return objective.microbatch(
        move(samples.tokens),
        None if samples.loss_weights is None else move(samples.loss_weights),
        None if samples.document_starts is None else move(samples.document_starts),
    )
