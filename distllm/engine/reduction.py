"""The mean of gradients over the data-parallel ranks, in buckets, after or during the backward passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


class GradientReduction:
    """All-reduces a flat gradient in buckets: one huge message would need a workspace of the same size.

    Parameters lie in the flat gradient in the order of the forward pass, so backward passes complete it from
    its end. If communication is overlapped, a bucket is sent once the last backward pass of a step has
    completed all gradients in it. Buckets are always sent from the last to the first, since all ranks must
    send in the same order.
    """

    def __init__(
        self,
        flat_gradient: Tensor,
        parameters: Mapping[nn.Parameter, range],
        bucket_size: int,
        group: dist.ProcessGroup,
        is_overlapped: bool,
    ) -> None:
        """Divide the flat gradient into buckets.

        parameters: the elements of `flat_gradient` that belong to each.
        bucket_size: in elements.
        """
        self.flat_gradient = flat_gradient
        self.group = group
        self.is_overlapped = is_overlapped and group.size() > 1
        self.buckets = flat_gradient.split(bucket_size) if group.size() > 1 else ()
        self._buckets_of = {
            parameter: range(where.start // bucket_size, (where.stop - 1) // bucket_size + 1)
            for parameter, where in parameters.items()
        }
        self._num_parameters = [0] * len(self.buckets)
        for parameter in parameters if self.buckets else ():
            for bucket in self._buckets_of[parameter]:
                self._num_parameters[bucket] += 1
        self._num_gradients_missing: list[int] = []
        self._unsent = 0  # buckets before this one are not sent yet
        self._sent: list[Any] = []

    def begin_step(self, num_microbatches: int) -> None:
        self._num_gradients_missing = [num * num_microbatches for num in self._num_parameters]
        self._unsent, self._sent = len(self.buckets), []

    def gradient_added(self, parameter: nn.Parameter) -> None:
        """Note that a microbatch's gradient of `parameter` is in the flat gradient; send what is complete."""
        if not self.is_overlapped:
            return
        for bucket in self._buckets_of[parameter]:
            self._num_gradients_missing[bucket] -= 1
        while self._unsent and self._num_gradients_missing[self._unsent - 1] == 0:
            self._send_next()

    def finish(self) -> None:
        """Send the buckets that are left, wait for all, and divide by the number of ranks.

        What is left: all buckets without overlap; with it, from the first bucket in the order of sending that
        holds a parameter without a gradient.
        """
        while self._unsent:
            self._send_next()
        for request in self._sent:
            request.wait()
        if self.buckets:
            self.flat_gradient.div_(self.group.size())

    def _send_next(self) -> None:
        self._unsent -= 1
        self._sent.append(dist.all_reduce(self.buckets[self._unsent], group=self.group, async_op=True))
