"""The folder of a run: its files, the state of the run, and its events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from distllm.config.problems import user_error
from distllm.metrics.environment import describe_environment
from distllm.metrics.jsonl import append_line, dump_line, load_line, write_atomically

State = Literal["running", "completed", "preempted", "failed"]


class RunDirectory:
    """The files of one run; only rank 0 writes in it through this class.

    Creates the folder and checks that it can be written, or raises a user error for `run.dir`; `create=False`
    only names the paths, for other ranks and for readers.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        self.config_path = path / "config.yaml"
        self.environment_path = path / "environment.json"
        self.metrics_path = path / "metrics.jsonl"
        self.tensorboard_path = path / "tensorboard"
        self.wandb_id_path = path / "wandb_run_id.txt"
        self.loss_plot_path = path / "loss.png"
        self.samples_path = path / "samples.txt"
        self.status_path = path / "status.json"
        self.events_path = path / "events.jsonl"
        self.checkpoints_path = path / "checkpoints"
        self.ledger_path = path / "ledger" / "ledger.json"
        if create:
            _create_writable(path)

    def write_config(self, text: str) -> None:
        """Write `config.yaml`: the resolved configuration."""
        write_atomically(self.config_path, text.encode())

    def write_environment(self, extra: Mapping[str, object]) -> None:
        """Write `environment.json`: versions, machine, commit, command line, and the entries of `extra`."""
        environment = _plain(describe_environment() | dict(extra))
        write_atomically(self.environment_path, json.dumps(environment, indent=2).encode() + b"\n")

    def write_status(self, state: State, reason: str, **fields: object) -> None:
        """Write `status.json`: what the run is doing and why, with any further `fields`."""
        status = {"state": state, "reason": reason, "time": utc_now(), **_plain(fields)}
        write_atomically(self.status_path, dump_line(status))

    def read_status(self) -> dict[str, Any] | None:
        """Return what `write_status` wrote last; None when the run has never written any."""
        try:
            return load_line(self.status_path.read_bytes())
        except FileNotFoundError:
            return None

    def last_sign(self) -> float | None:
        """Return when the run last wrote a row or an event, in seconds since the epoch; None if never."""
        times = [_modified(path) for path in (self.metrics_path, self.events_path)]
        return max((time for time in times if time), default=None)

    def event(self, kind: str, reason: str, **fields: object) -> None:
        """Append to `events.jsonl`: a start, stop, fault or rewind, when and why."""
        append_line(self.events_path, event_row(kind, reason, **fields))

    def read_events(self) -> list[dict[str, Any]]:
        """Return all events, oldest first. A line truncated by a kill is left out."""
        events = []
        if self.events_path.exists():
            for line in self.events_path.read_bytes().splitlines():
                with suppress(ValueError):
                    events.append(load_line(line))
        return events


def _modified(path: Path) -> float | None:
    return path.stat().st_mtime if path.exists() else None


def event_row(kind: str, reason: str, **fields: object) -> dict[str, Any]:
    """Return a line of `events.jsonl`."""
    return {"time": utc_now(), "kind": kind, "reason": reason, **_plain(fields)}


def utc_now() -> str:
    """Return the time in UTC, ISO 8601, to the millisecond: 2025-01-31T12:00:00.000+00:00."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _plain(fields: Mapping[str, object]) -> dict[str, Any]:
    """Return `fields` with text for values that JSON cannot hold (NaN, paths): reporting must not fail."""
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str), parse_constant=str)
    return plain


def _create_writable(path: Path) -> None:
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        # A real write: permission bits mean nothing for root, on read-only mounts or on squashed NFS.
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        rule = f"must be a folder that can be created and written ({error.strerror}: {error.filename})"
        raise user_error("run.dir", path, rule, "name a folder on a writable disk with free space") from error
