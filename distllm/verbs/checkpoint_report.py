"""Checkpoints as `distllm checkpoint` tells of them: tables as text. Pure, and without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from distllm.checkpoint.manifest import Manifest
from distllm.checkpoint.survey import Entry, Pruning
from distllm.config.compare import Changes, changed_settings, settings
from distllm.metrics.format import block, bytes_, count, plural, table

WEIGHT = "weight"
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1}
UNKNOWN = "?"
HEADS = ("step", "size", "layout", "written", "reason", "kept", "state")


def list_text(entries: Sequence[Entry], is_for_good: Callable[[Entry], bool]) -> str:
    """One row for each, newest last."""
    rows = [HEADS]
    for entry in entries:
        details = entry.manifest.details if entry.manifest else {}
        rows.append(
            (
                UNKNOWN if entry.step is None else f"{entry.step:,}",
                bytes_(entry.num_bytes),
                layout_text(details),
                time_text(details),
                str(details.get("reason", UNKNOWN)),
                "for good" if is_for_good(entry) else "",
                state_text(entry),
            )
        )
    return columns(rows, right=("step", "size"))


def columns(rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """A table whose first row names the columns; those in `right` are aligned there."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [">" if head in right else "<" for head in rows[0]]
    lines = (
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, aligned, widths, strict=True)) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def state_text(entry: Entry) -> str:
    """In one line, with the first problem."""
    more = f" (and {len(entry.problems) - 1} more)" if len(entry.problems) > 1 else ""
    return entry.state + (f": {entry.problems[0]}{more}" if entry.problems else "")


def layout_text(details: Mapping[str, Any]) -> str:
    """How the ranks shared the model that wrote it; a Hugging Face import has had no such layout."""
    layout, config = details.get("layout"), details.get("config", {})
    if not layout:
        return UNKNOWN
    degrees = " x ".join(f"{degree} {axis}" for axis, degree in layout.items())
    stage = config.get("zero", {}).get("stage", UNKNOWN)
    return f"{degrees}, ZeRO {stage}, {config.get('train', {}).get('precision', UNKNOWN)}"


def time_text(details: Mapping[str, Any]) -> str:
    """When the save began, in this machine's time zone."""
    time = details.get("time")
    return f"{datetime.fromisoformat(time).astimezone():%F %T}" if time else UNKNOWN


def show_text(entry: Entry, manifest: Manifest) -> str:
    """All that a checkpoint says of itself."""
    details = manifest.details
    config = settings(details.get("config", {}))
    sections = {
        "state": state_text(entry),
        "written": f"{time_text(details)}, {details.get('reason', UNKNOWN)}",
        "layout": layout_text(details),
        "tensors": _tensors(manifest),
        "files": _files(manifest),
        "data": _data(details),
        "versions": ", ".join(f"{name} {number}" for name, number in details.get("versions", {}).items()),
        "config": "\n".join(f"{name}={value}" for name, value in config.items()),
    }
    return block(f"step {manifest.step:,}: {entry.path}", sections)


def bytes_by_state(manifest: Manifest) -> dict[str, int]:
    """Elements times their size: of the fp32 weights, and of each state of the optimizer."""
    numel = sum(map(math.prod, manifest.tensors.values()))
    states = {WEIGHT: "float32"} | dict(sorted(manifest.states.items()))
    return {state: numel * ITEM_BYTES[dtype] for state, dtype in states.items()}


def _tensors(manifest: Manifest) -> str:
    numel = sum(map(math.prod, manifest.tensors.values()))
    sizes = {state: bytes_(size) for state, size in bytes_by_state(manifest).items()}
    scalars = {name: f"{value:g}, for all parameters" for name, value in manifest.scalars.items()}
    heading = f"{plural(len(manifest.tensors), 'parameter tensor')}, {count(numel)} parameters ({numel:,})"
    return f"{heading}\n{table(sizes | scalars)}"


def _files(manifest: Manifest) -> str:
    """By the folder that they lie in."""
    folders: dict[str, list[int]] = {}
    for name, record in manifest.files.items():
        folders.setdefault(name.partition("/")[0], []).append(record.bytes)
    lines = {
        folder: f"{plural(len(sizes), 'file')}, {bytes_(sum(sizes))}"
        for folder, sizes in sorted(folders.items())
    }
    return table(lines)


def _data(details: Mapping[str, Any]) -> str:
    data = details.get("data")
    if data is None:
        return "has seen none of our data"
    tokens = {name: source["train"]["num_tokens"] for name, source in data["sources"].items()}
    listed = ", ".join(
        f"{name} {count:,} with the fingerprint {data['sources'][name]['fingerprint']}"
        for name, count in tokens.items()
    )
    return f"next sample {details['state']['next_sample']:,}; training tokens: {listed}"


def difference_text(old: Manifest, new: Manifest, old_name: str) -> str:
    """What the job of `new` has otherwise than that of `old`, and which tensors have another shape."""
    changes = changed_settings(old.details.get("config", {}), new.details.get("config", {}))
    return block(
        f"against {old_name}, step {old.step:,}",
        {
            "config": changes_text(changes) or "the same settings",
            "tensors": changes_text(changed_shapes(old, new)) or "the same tensors, of the same shapes",
        },
    )


def changed_shapes(old: Manifest, new: Manifest) -> Changes:
    """{tensor: (its shape in the first, in the second)} where they differ."""
    return {
        name: (str(old.tensors.get(name, "none")), str(new.tensors.get(name, "none")))
        for name in sorted(old.tensors.keys() | new.tensors.keys())
        if old.tensors.get(name) != new.tensors.get(name)
    }


def changes_text(changes: Changes) -> str:
    return "\n".join(f"{name}: {before} -> {after}" for name, (before, after) in changes.items())


def prune_text(plan: Pruning, sizes: Mapping[str, int], rule: str, is_done: bool) -> str:
    """rule: what is kept, in words. sizes: {name: bytes on disk} of what goes."""
    freed = sum(sizes.values())
    sections = {
        "rule": rule,
        "kept": "\n".join(f"{path.name}: good" for path in plan.kept),
        "for good": "\n".join(path.name for path in plan.for_good),
        "doubtful": "\n".join(f"{path.name}: not counted: {why}" for path, why in plan.doubtful.items()),
        "removed" if is_done else "would go": table({name: bytes_(size) for name, size in sizes.items()})
        or "nothing",
        "freed" if is_done else "would free": f"{bytes_(freed)} ({freed:,} bytes)",
    }
    return block("pruned" if is_done else "dry run: nothing is removed", sections)
