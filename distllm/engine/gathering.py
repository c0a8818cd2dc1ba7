"""Updated weights from the ranks that own their parts, ahead of their use in the next forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distllm.layout.flat import Bucket
from distllm.layout.groups import Role


class WeightGathering:
    """Keeps weights in flat buckets, of which each rank updates its part, and gathers the other parts.

    Buckets are gathered in the order of the forward pass. If communication is overlapped, a module waits for
    the buckets of its own parameters when it is called.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket[nn.Parameter]],
        role: Role,
        chunks: Iterable[nn.Module],
        is_overlapped: bool,
    ) -> None:
        """Move the parameters of `buckets` into flat tensors, bucket by bucket: one is held twice at most."""
        self.role = role
        self.is_overlapped = is_overlapped
        self.weights = [_flattened(bucket) for bucket in buckets]
        self.owned = [flat[b.part(role.rank)] for b, flat in zip(buckets, self.weights, strict=True)]
        self._pending: dict[int, Any] = {}
        bucket_of = {p: index for index, bucket in enumerate(buckets) for p in bucket.ranges}
        for module in (module for chunk in chunks for module in chunk.modules()):
            needed = sorted({bucket_of[p] for p in module.parameters(recurse=False)})
            if needed and is_overlapped:
                module.register_forward_pre_hook(lambda *_, needed=tuple(needed): self._wait(needed))

    def start(self) -> None:
        """Gather what the ranks have updated; return at once if communication is overlapped."""
        assert not self._pending, "weights were updated while they were gathered"
        for index, (whole, owned) in enumerate(zip(self.weights, self.owned, strict=True)):
            self._pending[index] = dist.all_gather_into_tensor(
                whole, owned, group=self.role.group, async_op=True
            )
        if not self.is_overlapped:
            self.finish()

    def finish(self) -> None:
        """Wait for all weights: before they are written, or read outside of a forward pass."""
        self._wait(tuple(self._pending))

    def _wait(self, needed: Iterable[int]) -> None:
        for index in needed if self._pending else ():
            request = self._pending.pop(index, None)
            if request is not None:
                request.wait()


@torch.no_grad()
def _flattened(bucket: Bucket[nn.Parameter]) -> Tensor:
    """Return [numel] weights; the parameters become views of it."""
    first = next(iter(bucket.ranges))
    flat = torch.zeros(bucket.numel, dtype=first.dtype, device=first.device)
    for parameter, where in bucket.ranges.items():
        view = flat[where.start : where.stop].view_as(parameter)
        view.copy_(parameter)
        parameter.data = view
    return flat
