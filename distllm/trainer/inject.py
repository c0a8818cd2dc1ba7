"""Faults injected for tests: `fault.inject=["nan:step=3,rank=1", "sleep:rank=2,seconds=0.3,times=0"]`.

KIND: `nan`, `spike` (the gradients of the rank are multiplied by nan, or by `factor`), `kill`, `stop` (the
process sends SIGKILL, or SIGSTOP, to itself), `sleep` (for `seconds`), `hang` (sleeps for ever, as a stuck
kernel would), `error` (raises an exception). Where: at `step` (0 is the first), or at a step that trains on
`sample`, on `rank`; a key that is left out matches all. `times`: how often in one start of the process, 1 by
default, 0 without limit.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field

from distllm.config.problems import user_error

KINDS = ("nan", "spike", "kill", "stop", "sleep", "hang", "error")
KEYS = {"step": int, "sample": int, "rank": int, "times": int, "seconds": float, "factor": float}


@dataclass
class Injection:
    """One fault. left: how often it may still happen; -1 means without limit."""

    kind: str
    step: int | None = None
    sample: int | None = None
    rank: int | None = None
    times: int = 1
    seconds: float = 0.0
    factor: float = 1e4
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.times or -1

    def strikes(self, rank: int, step: int, samples: range) -> bool:
        """Return whether the fault happens in this step; if so, count it."""
        matches = (
            self.left != 0
            and self.rank in (None, rank)
            and self.step in (None, step)
            and (self.sample is None or self.sample in samples)
        )
        self.left -= matches and self.left > 0
        return matches


def parse(text: str) -> Injection:
    """Parse one entry of `fault.inject`. User error: it is invalid."""
    kind, _, rest = text.partition(":")
    try:
        pairs = [part.split("=", 1) for part in rest.split(",") if part]
        if kind not in KINDS:
            raise ValueError(f"the kind must be one of {', '.join(KINDS)}")
        return Injection(kind, **{key: KEYS[key](value) for key, value in pairs})
    except (KeyError, ValueError, TypeError) as error:
        raise user_error(
            "fault.inject",
            text,
            f"must be KIND:KEY=VALUE,... with the keys {', '.join(KEYS)} ({error})",
            "fault.inject=['nan:step=3,rank=1'], or fault.inject=[]",
        ) from error


class Injector:
    """The faults of one rank."""

    def __init__(self, texts: list[str], rank: int) -> None:
        self._injections = [parse(text) for text in texts]
        self._rank = rank

    def before_step(self, step: int, samples: range) -> float | None:
        """Inject the faults of this step; return the factor on its gradients, None for no change."""
        factor = None
        for injection in self._injections:
            if injection.strikes(self._rank, step, samples):
                if injection.kind in ("nan", "spike"):
                    factor = injection.factor if injection.kind == "spike" else float("nan")
                else:
                    _strike(injection)
        return factor


def _strike(injection: Injection) -> None:
    if injection.kind == "error":
        raise RuntimeError("an injected error")
    if injection.kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if injection.kind == "kill" else signal.SIGSTOP)
    time.sleep(injection.seconds if injection.kind == "sleep" else 1e6)
