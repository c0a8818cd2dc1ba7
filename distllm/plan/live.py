"""The parameters that ZeRO-3 holds whole at once, by the rules of DeepSpeed 0.19.8. Pure.

`PartitionedParameterCoordinator` gathers what the next module needs, prefetches up to `zero.bucket_size`
elements beyond it, and releases what has run unless it is used again soon.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import accumulate

from distllm.plan.gather import MAX_REUSE_NUMEL, module_uses
from distllm.plan.rank_view import RankView

# deepspeed/runtime/zero/config.py: stage3_max_live_parameters, up to which it prefetches.
MAX_LIVE_NUMEL = 1_000_000_000


@dataclass(frozen=True)
class Live:
    """Elements that are whole on a rank beside its parts.

    held: the most at once, without those that are never partitioned.
    gathered: the most that one gather of several parameters brings; each is then copied out of its buffer
        (`AllGatherCoalescedHandle.wait`).
    """

    held: int
    gathered: int


def live_parameters(
    view: RankView,
    max_reuse_numel: int = MAX_REUSE_NUMEL,
    max_live_numel: int = MAX_LIVE_NUMEL,
    most_microbatches: int | None = None,
) -> Live:
    """Return the most parameters that are whole at once in a step after the first.

    most_microbatches: as many are followed at most; None: enough to fill a pipeline, after which all is
        repetition.
    """
    most = most_microbatches or view.grid.pipeline * len(view.stage.chunks) + 1
    return _Coordinator(view, max_reuse_numel, max_live_numel).run(min(view.num_microbatches, most))


class _Coordinator:
    """What DeepSpeed's coordinator knows: parameters that are whole, and the order in which all are used."""

    def __init__(self, view: RankView, max_reuse_numel: int, max_live_numel: int) -> None:
        self.view = view
        self.max_reuse_numel, self.max_live_numel = max_reuse_numel, max_live_numel
        self.bucket_size = view.config.zero.bucket_size
        self.sizes = {name: math.prod(shape) for name, shape in view.held.shapes.items()}
        threshold = view.config.zero.persistence_threshold
        self.partitioned = {name for name, size in self.sizes.items() if size > threshold}
        self.whole: set[str] = set()
        self.numel = self.most_held = self.most_gathered = 0
        self.last_seen: dict[str, int] = {}  # the last use that the prefetcher has passed

    def run(self, num_microbatches: int) -> Live:
        uses = list(module_uses(self.view, num_microbatches))
        before = [0, *accumulate(sum(self.sizes[name] for name in use) for use, _ in uses)]
        next_use = _next_uses([use for use, _ in uses])
        queue = deque((name, step) for step, (use, _) in enumerate(uses) for name in use)
        for step, (use, is_always_released) in enumerate(uses):
            self.gather([name for name in use if name in self.partitioned and name not in self.whole])
            self.prefetch(queue, step, use)
            for name in use:
                following = next_use[step].get(name)
                is_kept = self.last_seen[name] > step + 1 or (
                    following is not None and before[following] - before[step + 1] < self.max_reuse_numel
                )
                if name in self.whole and (is_always_released or not is_kept):
                    self.whole.remove(name)
                    self.numel -= self.sizes[name]
        return Live(self.most_held, self.most_gathered)

    def gather(self, names: list[str]) -> None:
        numel = sum(self.sizes[name] for name in names)
        self.whole.update(names)
        self.numel += numel
        self.most_held = max(self.most_held, self.numel)
        if len(names) > 1:  # a single one is gathered in place
            self.most_gathered = max(self.most_gathered, numel)

    def prefetch(self, queue: deque[tuple[str, int]], step: int, use: tuple[str, ...]) -> None:
        """Take the parameters of this use from the queue, then gather those that follow."""
        while queue and queue[0][1] <= step:
            name, used_at = queue.popleft()
            self.last_seen[name] = max(used_at, self.last_seen.get(name, 0))
        room = min(self.max_live_numel - self.numel, self.bucket_size)
        names: list[str] = []
        numel = 0
        while queue and numel < room:
            name, used_at = queue.popleft()
            self.last_seen[name] = max(used_at, self.last_seen.get(name, 0))
            if name in self.partitioned and name not in self.whole and name not in names:
                names.append(name)
                numel += self.sizes[name]
        self.gather(names)


def _next_uses(uses: list[tuple[str, ...]]) -> list[dict[str, int]]:
    """Return for each use the position of the next use of each of its parameters."""
    following: dict[str, int] = {}
    found: list[dict[str, int]] = []
    for position in range(len(uses) - 1, -1, -1):
        found.append({name: following[name] for name in uses[position] if name in following})
        following |= dict.fromkeys(uses[position], position)
    return found[::-1]
