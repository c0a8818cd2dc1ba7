"""How a process ends whose process groups cannot be taken down.

After a failure peers may be gone or stuck: `destroy_process_group` would wait for NCCL's kernels, which never
end, and so would the interpreter's own shutdown. Such a process writes out its streams and leaves at once.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import traceback
from contextlib import suppress
from typing import NoReturn

from distllm.config.problems import EXIT_USER_ERROR, UserError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
CLEANUP_SECONDS = 10.0

_state = {"groups are left": False}


def leave_groups() -> None:
    """Note that this process will end without taking its groups down."""
    _state["groups are left"] = True


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a process that an error ends."""
    if isinstance(error, UserError):
        return EXIT_USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return EXIT_FAILED


def end_process(exit_code: int) -> NoReturn:
    """End this process at once, whatever its threads wait for."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(exit_code)


def end_within(seconds: float, exit_code: int) -> None:
    """End this process, with the stacks of its threads on standard error, unless it has ended by then.

    For what cleans up after a failure, of which any part may wait for a thread that was interrupted.
    """

    def end() -> None:
        faulthandler.dump_traceback(all_threads=True)
        end_process(exit_code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def end_if_groups_are_left(outcome: int | BaseException) -> None:
    """End a process at once that cannot end in the usual way; else do nothing.

    outcome: the exit code, or an error, which is printed as the interpreter would.
    """
    if not _state["groups are left"]:
        return
    if isinstance(outcome, int):
        end_process(outcome)
    if not isinstance(outcome, SystemExit):
        traceback.print_exception(outcome)
    end_process(exit_code_of(outcome))
