"""The mean of gradients over the data-parallel ranks, in buckets, after or during the backward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from distllm.layout.flat import Bucket
from distllm.layout.groups import Role


class GradientReduction:
    """All-reduces buckets of gradients, or scatters their sums where ranks share the optimizer's states.

    Buckets lie in the order of the forward pass, so backward passes complete them from the last. If
    communication is overlapped, a bucket is sent once the last backward pass of a step has completed all
    gradients in it. Buckets are always sent from the last to the first, since all ranks must send in the same
    order.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket[nn.Parameter]],
        gradients: Sequence[Tensor],
        role: Role,
        max_message_numel: int,
        is_overlapped: bool,
    ) -> None:
        """Reduce over the ranks of `role`.

        buckets: of one part, all-reduced, or as many as there are ranks: each gets the sum of its own.
        gradients: [numel] of each bucket.
        max_message_numel: all-reduces are cut, as a huge one would need a workspace of its size.
        """
        assert all(bucket.num_parts in (1, role.size) for bucket in buckets), "a part for each rank, or one"
        self.role = role
        self.is_needed = role.size > 1
        self.is_overlapped = is_overlapped and self.is_needed
        self.max_message_numel = max_message_numel
        self.buckets = buckets
        self.gradients = gradients
        self.owned = [flat[bucket.part(role.rank % bucket.num_parts)] for bucket, flat in self._pairs()]
        self._bucket_of = {p: index for index, bucket in enumerate(buckets) for p in bucket.ranges}
        self._num_gradients_missing: list[int] = []
        self._unsent = 0  # buckets before this one are not sent yet
        self._sent: list[Any] = []

    def begin_step(self, num_microbatches: int) -> None:
        self._num_gradients_missing = [len(bucket.ranges) * num_microbatches for bucket in self.buckets]
        self._unsent, self._sent = len(self.buckets), []

    def gradient_added(self, parameter: nn.Parameter) -> None:
        """Note that a microbatch's gradient of `parameter` is in its bucket; send what is complete."""
        if not self.is_overlapped:
            return
        self._num_gradients_missing[self._bucket_of[parameter]] -= 1
        while self._unsent and self._num_gradients_missing[self._unsent - 1] == 0:
            self._send_next()

    def finish(self) -> None:
        """Send the buckets that are left, wait for all, and divide by the number of ranks.

        What is left: all buckets without overlap; with it, from the first bucket in the order of sending that
        holds a parameter without a gradient.
        """
        if not self.is_needed:
            return
        while self._unsent:
            self._send_next()
        for request in self._sent:
            request.wait()
        for owned in self.owned:
            owned.div_(self.role.size)

    def _pairs(self) -> Iterator[tuple[Bucket[nn.Parameter], Tensor]]:
        return zip(self.buckets, self.gradients, strict=True)

    def _send_next(self) -> None:
        self._unsent -= 1
        index, group = self._unsent, self.role.group
        if self.buckets[index].num_parts > 1:
            # In place: this rank's part of the sum takes the place of its own part.
            owned, whole = self.owned[index], self.gradients[index]
            self._sent.append(dist.reduce_scatter_tensor(owned, whole, group=group, async_op=True))
            return
        for message in self.gradients[index].split(self.max_message_numel):
            self._sent.append(dist.all_reduce(message, group=group, async_op=True))
