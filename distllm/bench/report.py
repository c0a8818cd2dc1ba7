"""The output of a measurement: a table for readers, and JSON with all that is needed to repeat it."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from distllm.config.compose import to_plain
from distllm.config.schema import Config
from distllm.metrics.environment import describe_environment
from distllm.metrics.format import plural


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity; the median is the figure."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Report:
    """A measurement's result. table: for people. results: for JSON; dataclasses as dicts."""

    table: str
    results: dict[str, Any]


def to_json(action: str, config: Config, report: Report) -> str:
    """Return the results as JSON, with date, machine, versions and the whole config."""
    return json.dumps(
        {
            "bench": action,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": describe_environment(),
            "device": device_name(),
            "load_average": os.getloadavg(),
            "results": report.results,
            "config": to_plain(config),
        },
        indent=1,
    )


def device_name() -> str:
    """Return the name of the GPU, or of the processor with its number of threads."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"processor, {plural(torch.get_num_threads(), 'thread')}"
