"""The messages between ranks in a step: calls and bytes by process group and kind of collective. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Amount(NamedTuple):
    """A number of calls and their bytes.

    bytes: size of the message: of the whole tensor that an all-reduce, broadcast or send handles, of the
        output of an all-gather, of the input of a reduce-scatter.
    """

    calls: int
    bytes: int

    def __mul__(self, times: object) -> Amount:
        assert isinstance(times, int), "a step holds a whole number of calls"
        return Amount(self.calls * times, self.bytes * times)


class Transfer(NamedTuple):
    """A kind of message in a group.

    group: data, tensor, pipeline, model, embedding or world.
    kind: of the collective, as PyTorch calls it (all_reduce, all_gather, reduce_scatter, broadcast, send,
        recv, ...).
    """

    group: str
    kind: str


Traffic = Mapping[Transfer, Amount]


def add_up(parts: Iterable[tuple[Transfer, Amount]]) -> dict[Transfer, Amount]:
    """Add the amounts of equal transfers; transfers without a call are left out."""
    total: dict[Transfer, Amount] = {}
    for transfer, amount in parts:
        if amount.calls:
            before = total.get(transfer, Amount(0, 0))
            total[transfer] = Amount(before.calls + amount.calls, before.bytes + amount.bytes)
    return total


def sent_bytes(kind: str, message_bytes: float, group_size: int) -> float:
    """Return the bytes that one rank of a group sends for a message, on average over its ranks.

    All-reduce, all-gather and reduce-scatter: the least of any algorithm, reached by a ring (Patarasuk & Yuan
    2009; the same factors turn time into "bus bandwidth" in NVIDIA's nccl-tests, doc/PERFORMANCE.md). A
    broadcast passes the message on once for each rank but one.
    """
    others = (group_size - 1) / group_size
    factors = {
        "all_reduce": 2 * others,
        "all_gather": others,
        "reduce_scatter": others,
        "all_to_all": others,
        "broadcast": others,
        "reduce": others,
        "gather": others,
        "scatter": others,
        "send": 1.0,
        "recv": 0.0,
        "barrier": 0.0,
    }
    return factors[kind] * message_bytes
