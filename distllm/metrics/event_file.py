"""A TensorBoard event file, written without torch, TensorFlow, queues or threads."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path


class EventFile:
    """Scalars for TensorBoard; each `write` is on disk (not only in a buffer) when it returns.

    folder: created when missing.
    resume_step: curves of earlier files lose their points after this step, so that a resumed run draws each
        step once.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names: time first, fixed width.
        name = f"events.out.tfevents.{time.time_ns():019d}.{socket.gethostname()}.{os.getpid()}"
        self._event = Event
        self._file = RecordWriter(open(folder / name, "xb", buffering=0))  # noqa: SIM115 - closed by close()
        self._write(file_version="brain.Event:2")
        first_step = resume_step + 1 if resume_step else 0
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Write one point per tag at `step`; NaN and infinity are shown as such. OSError: disk full."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(step=step, summary=Summary(value=values))

    def _write(self, **fields: object) -> None:
        self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        self._file.close()
