"""How far training has come: all that a resume needs to know beside weights and optimizer states."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainState:
    """step: updates done. next_sample: global sample number with which the next step begins; the order of the
    data is a function of it alone, so it is the whole state of the data."""

    step: int = 0
    next_sample: int = 0

    def after_step(self, global_batch_size: int) -> TrainState:
        return TrainState(self.step + 1, self.next_sample + global_batch_size)
