"""User errors: each problem with setting, value, rule and fix, all in one message, exit code 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distllm.config.schema import Config

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 3  # stopped on purpose; the same command goes on


@dataclass(frozen=True)
class Problem:
    """One thing that the user has to change.

    setting: dotted name, as it is written on the command line. value: what it is now.
    rule: what must hold. fix: what to write instead.
    """

    setting: str
    value: object
    rule: str
    fix: str

    def __str__(self) -> str:
        written = {None: "null", True: "true", False: "false"}
        value = written[self.value] if self.value is None or isinstance(self.value, bool) else self.value
        return f"{self.setting}={value}\n    rule: {self.rule}\n    fix:  {self.fix}"


class UserError(ValueError):
    """Raised on every rank alike; `__main__` prints it once, without a traceback, and exits with 2.

    config: the rejected job, where every setting is valid by itself. advice: printed below the problems.
    """

    def __init__(self, problems: Sequence[Problem], config: Config | None = None, advice: str = "") -> None:
        assert problems, "a UserError needs at least one problem"
        self.problems = tuple(problems)
        self.config = config
        heading = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        body = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))
        super().__init__(f"{heading} with this job:\n{body}" + (f"\n{advice}" if advice else ""))

    def __reduce__(self) -> tuple[type[UserError], tuple[tuple[Problem, ...]]]:
        """Pickle the problems, so that rank 0 can send the error to the other ranks."""
        return UserError, (self.problems,)


def user_error(setting: str, value: object, rule: str, fix: str) -> UserError:
    """Return a `UserError` with a single problem."""
    return UserError([Problem(setting, value, rule, fix)])
