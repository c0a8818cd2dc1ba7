"""Where a run starts, and what it saves for the next start."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distllm.checkpoint.dcp import refuse_other_model, stored_states
from distllm.checkpoint.manager import checkpoint_path, choose_checkpoint, remove_old
from distllm.checkpoint.store import Manifest, read_manifest, read_metadata, read_tensors, write_checkpoint
from distllm.config.problems import Problem, UserError
from distllm.config.schema import Config
from distllm.data.prepare import PreparedData
from distllm.engine.engine import Engine
from distllm.metrics.format import duration
from distllm.metrics.run_directory import RunDirectory
from distllm.trainer.reporter import Reporter

# Which tokens come in which step hangs on the first; the weights hang on all of the model but the second.
ORDER_SETTINGS = ("train.seed", "train.global_batch_size", "model.seq_length")
FREE_MODEL_SETTINGS = ("model.name", "model.init_std")


@dataclass(frozen=True)
class Start:
    """path: checkpoint to load, None for fresh weights. step: updates done. damaged: newer checkpoints that
    were passed over, each with what is wrong with it. finished: there is nothing left to do."""

    path: Path | None
    step: int
    damaged: tuple[str, ...] = ()
    finished: bool = False


def find_start(config: Config, prepared: PreparedData) -> Start:
    """Look into the run directory, on one rank, before anything expensive."""
    run = RunDirectory(Path(config.run.dir))
    choice = choose_checkpoint(run.checkpoints_path, config.checkpoint)
    if choice.path is None:
        status = run.read_status() or {}
        done = status.get("step", 0) if status.get("state") == "completed" else 0
        is_finished = config.checkpoint.resume == "auto" and done >= config.train.steps
        return Start(None, done if is_finished else 0, finished=is_finished)
    manifest = read_manifest(choice.path)
    _refuse_other_job(config, prepared, manifest, choice.path)
    return Start(choice.path, manifest.step, choice.damaged, finished=manifest.step >= config.train.steps)


def restore(engine: Engine, start: Start) -> None:
    """Load weights and optimizer states. Collective."""
    assert start.path is not None, "a fresh start has nothing to restore"
    metadata = read_metadata(start.path)
    refuse_other_model(metadata, engine.places.values(), str(start.path))
    read_tensors(start.path, engine.fragments(create_states=stored_states(metadata)))
    engine.after_load(read_manifest(start.path).scalars)


def save(config: Config, engine: Engine, prepared: PreparedData, reporter: Reporter, step: int) -> None:
    """Write the checkpoint of `step` updates and drop the oldest. Collective."""
    begin = time.perf_counter()
    path = checkpoint_path(reporter.run.checkpoints_path, step)
    write_checkpoint(
        path,
        engine.fragments(),
        step=step,
        scalars=engine.scalars(),
        details=_details(config, engine, prepared),
    )
    if reporter.is_main:
        remove_old(path, config.checkpoint.keep)
    seconds = time.perf_counter() - begin
    reporter.event("checkpoint", "interval", step=step, seconds=round(seconds, 3), path=str(path))
    reporter.progress.note(f"step {step}: checkpoint saved in {duration(seconds)}: {path}")


def _details(config: Config, engine: Engine, prepared: PreparedData) -> dict[str, Any]:
    grid = engine.groups.grid
    return {
        "config": dataclasses.asdict(config),
        "layout": {"data": grid.data, "tensor": grid.tensor, "pipeline": grid.pipeline},
        "data": {"fingerprint": prepared.fingerprint, "num_train_tokens": prepared.train.num_tokens},
        "tokenizer": {"folder": str(prepared.tokenizer_folder), "vocab_size": prepared.vocab_size},
        "versions": {name: version(name) for name in ("torch", "deepspeed", "megatron-core")},
    }


def _refuse_other_job(config: Config, prepared: PreparedData, manifest: Manifest, path: Path) -> None:
    """The order of the data must be as it was, else samples are lost or repeated; and so must the model.

    The model is compared by its settings, since nothing is built yet; `restore` compares every shape.
    """
    before, now = _settings(manifest.details["config"]), _settings(dataclasses.asdict(config))
    problems = []
    for setting, value in before.items():
        if setting in ORDER_SETTINGS:
            reason = "the order of the data hangs on it"
        elif setting.startswith("model.") and setting not in FREE_MODEL_SETTINGS:
            reason = "the weights hang on it"
        else:
            continue
        if now.get(setting) != value:
            rule = f"{reason}, and {path.name} was made with {value}"
            problems.append(
                Problem(setting, now.get(setting), rule, f"{setting}={value}, or another run.dir")
            )
    fingerprint = manifest.details["data"]["fingerprint"]
    if fingerprint != prepared.fingerprint:
        problems.append(
            Problem(
                "data",
                f"fingerprint {prepared.fingerprint}",
                f"the tokens must be those that {path.name} was trained on, fingerprint {fingerprint}",
                "restore the documents and the tokenizer, or take another run.dir",
            )
        )
    if problems:
        raise UserError(problems)


def _settings(config: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """{"section.name": value as it is written on the command line}."""
    return {
        f"{section}.{name}": value if isinstance(value, str) else json.dumps(value)
        for section, content in config.items()
        for name, value in content.items()
    }
