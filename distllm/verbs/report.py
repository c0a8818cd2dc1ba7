"""`distllm report`: what became of a run's time."""

from __future__ import annotations

from pathlib import Path

from distllm.config.compose import Request
from distllm.config.problems import user_error
from distllm.config.schema import Config
from distllm.metrics.format import block
from distllm.metrics.goodput import account, describe, describe_step, step_account
from distllm.metrics.run_directory import RunDirectory
from distllm.metrics.sinks import read_rows


def run(config: Config, request: Request) -> int:
    directory = RunDirectory(Path(config.run.dir), create=False)
    events, last_sign = directory.read_events(), directory.last_sign()
    if not events or last_sign is None:
        rule = "must be the folder of a run that has started"
        raise user_error("run.dir", config.run.dir, rule, "run.dir=FOLDER of `distllm train`")
    status = directory.read_status() or {}
    kinds: dict[str, int] = {}
    for event in events:
        kinds[event["kind"]] = kinds.get(event["kind"], 0) + 1
    rows = read_rows(directory.metrics_path)
    sections = {
        "run": str(directory.path),
        "state": f"{status.get('state', 'unknown')}: {status.get('reason', '')}",
        "time": describe(account(events, rows, last_sign)),
        "mean step": describe_step(step_account(rows)),
        "events": ", ".join(f"{number} x {kind}" for kind, number in kinds.items()),
    }
    print(block("distllm report", sections))
    return 0
