"""Parts of a corpus, prepared apart: on many machines, at any time, in a cache that all of them share."""

from __future__ import annotations

import re
from dataclasses import dataclass

from distllm.config.problems import UserError, user_error
from distllm.data.preparation.pieces import Work


@dataclass(frozen=True)
class Shard:
    """A part of the work: every `number`-th unit of each source, from `index` on."""

    index: int
    number: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse INDEX/NUMBER; a user error for any other text."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if not match or int(match[1]) >= int(match[2]):
            raise user_error("shard", text, "must be INDEX/NUMBER, INDEX from 0 to NUMBER - 1", "shard=0/16")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.number}"

    @property
    def label(self) -> str:
        return f"shard-{self.index}-of-{self.number}"

    def units(self, num_units: int) -> range:
        return range(self.index, num_units, self.number)


def missing_pieces(name: str, work: Work, missing: list[int]) -> UserError:
    """Explain why the pieces cannot be joined yet. Shards are named as in the call that last started one."""
    locks = sorted(work.folder.glob("shard-*-of-*.lock"), key=lambda file: file.stat().st_mtime_ns)
    rule = f"{len(missing):,} of {len(work.units):,} pieces of {name} are missing"
    if locks:
        number = int(locks[-1].stem.rpartition("-")[2])
        shards = sorted({index % number for index in missing})
        rule += f": those of shard{'s' * (len(shards) > 1)} {', '.join(map(str, shards))} of {number}"
    return user_error(
        "data",
        "merge",
        rule,
        "distllm data shard=INDEX/NUMBER for these, or distllm data, which makes the rest",
    )
