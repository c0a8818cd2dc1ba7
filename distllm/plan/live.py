"""The parameters that ZeRO-3 holds whole at once, by the rules of DeepSpeed 0.19.8. Pure.

`PartitionedParameterCoordinator` gathers what the next module needs, prefetches up to `zero.bucket_size`
elements beyond it, and releases what has run unless it is used again soon.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from itertools import accumulate

from distllm.layout.whole import WholeLimits, whole_limits
from distllm.plan.gather import module_passes, returned_biases
from distllm.plan.rank_view import RankView

ROUNDS = 3  # of microbatches that are followed before the rest is taken for repetition


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
    view: RankView, limits: WholeLimits | None = None, most_microbatches: int | None = None
) -> Live:
    """Return the most parameters that are whole at once in a step after the first.

    limits: other than those that the engine sets.
    most_microbatches: as many are followed at most; None: enough to fill a pipeline, after which all is
        repetition.
    """
    most = most_microbatches or view.grid.pipeline * len(view.stage.chunks) + 1
    coordinator = _Coordinator(view, limits)
    coordinator.run(min(view.num_microbatches, most))
    return Live(coordinator.most_held, coordinator.most_gathered)


def gathered_parameters(
    view: RankView, num_microbatches: int, limits: WholeLimits | None = None
) -> list[int]:
    """Return the elements of every parameter that one rank gathers in a step, once for each gather.

    In a step after the first, which only learns the order of modules. Parameters up to
    `zero.persistence_threshold` are gathered once, after the update.
    """
    # From some microbatch on each round of them gathers what the one before did.
    period = view.grid.pipeline if len(view.stage.chunks) > 1 else 1
    followed = ROUNDS * period * len(view.stage.chunks) + view.grid.pipeline
    repeated = max(0, num_microbatches - followed - period) // period
    found = follow_gathers(view, num_microbatches - repeated * period, limits)
    if repeated:
        more = follow_gathers(view, num_microbatches - (repeated - 1) * period, limits)
        more.subtract(found)
        found.update({size: repeated * times for size, times in more.items()})
    return list(found.elements())


def follow_gathers(view: RankView, num_microbatches: int, limits: WholeLimits | None) -> Counter[int]:
    """Return how often a parameter of each size is gathered, following every microbatch of a step."""
    coordinator = _Coordinator(view, limits)
    coordinator.run(num_microbatches)
    persistent = [size for name, size in coordinator.sizes.items() if name not in coordinator.partitioned]
    return Counter(coordinator.gathered + persistent)


class _Coordinator:
    """What DeepSpeed's coordinator knows: parameters that are whole, and the order in which all are used.

    `PartitionedParameterCoordinator.__params_to_release`: a parameter stays after its module has run if it is
    used again before `limits.reuse` elements of others are, or if the prefetcher has already passed a later
    use.
    """

    def __init__(self, view: RankView, limits: WholeLimits | None) -> None:
        self.view = view
        self.bucket_size = view.config.zero.bucket_size
        self.sizes = {name: math.prod(shape) for name, shape in view.held.shapes.items()}
        self.limits = limits or whole_limits(self.sizes, self.bucket_size)
        threshold = view.config.zero.persistence_threshold
        self.partitioned = {name for name, size in self.sizes.items() if size > threshold}
        layers = [layer for chunk in view.stage.chunks for layer in chunk]
        self.never_released = {name for layer in layers for name in returned_biases(view, layer)}
        self.whole: set[str] = set()
        self.gathered: list[int] = []
        self.numel = self.most_held = self.most_gathered = 0
        self.last_seen: dict[str, int] = {}  # the last use that the prefetcher has passed

    def run(self, num_microbatches: int) -> None:
        """Follow one step: fetches are counted as DeepSpeed counts them, to know what is used soon."""
        passes = list(module_passes(self.view, num_microbatches))
        fetches = [use for a_pass in passes for use in a_pass.fetches]
        self.before = [0, *accumulate(sum(self.sizes[name] for name in use) for use in fetches)]
        queue = deque((name, step) for step, use in enumerate(fetches) for name in use)
        self.used_at: dict[str, list[int]] = defaultdict(list)
        for name, step in queue:
            self.used_at[name].append(step)
        step = -1
        for a_pass in passes:
            for use in a_pass.fetches:
                step += 1
                self.gather([name for name in use if name in self.partitioned and name not in self.whole])
                self.prefetch(queue, step, use)
                for name in use:
                    if name not in a_pass.ended and not self.is_kept(name, step):
                        self.release(name)
            for name in a_pass.ended:
                if not a_pass.is_forward or not self.is_kept(name, step):
                    self.release(name)

    def is_kept(self, name: str, step: int) -> bool:
        if self.last_seen[name] > step + 1:
            return True
        following = bisect_right(self.used_at[name], step)
        if following == len(self.used_at[name]):
            return False
        return self.before[self.used_at[name][following]] - self.before[step + 1] < self.limits.reuse

    def release(self, name: str) -> None:
        if name in self.whole and name not in self.never_released:
            self.whole.remove(name)
            self.numel -= self.sizes[name]

    def gather(self, names: list[str]) -> None:
        sizes = [self.sizes[name] for name in names]
        numel = sum(sizes)
        self.gathered += sizes
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
        room = min(self.limits.live - self.numel, self.bucket_size)
        names: list[str] = []
        numel = 0
        while queue and numel < room:
            name, used_at = queue.popleft()
            self.last_seen[name] = max(used_at, self.last_seen.get(name, 0))
            if name in self.partitioned and name not in self.whole and name not in names:
                names.append(name)
                numel += self.sizes[name]
        self.gather(names)
