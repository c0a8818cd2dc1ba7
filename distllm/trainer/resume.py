"""Where a run starts: which checkpoint, what may differ from the job that wrote it, and what may not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distllm.checkpoint.manifest import Manifest, find_damage, read_manifest
from distllm.checkpoint.retention import candidates, choose
from distllm.checkpoint.store import read_tensors
from distllm.config.compare import Changes, changed_settings, settings
from distllm.config.compose import to_plain
from distllm.config.problems import Problem, UserError, user_error
from distllm.config.schema import Config
from distllm.data.prepared import PreparedData
from distllm.data.record import what_changed
from distllm.engine.engine import Engine
from distllm.layout.tree import Tree
from distllm.metrics.run_directory import RunDirectory
from distllm.runtime.dist import on_main_rank
from distllm.trainer.open_data import OpenedData, refuse_exhausted
from distllm.trainer.state import TrainState

# The order of the data depends on the first; the weights depend on all settings of the model but the second.
ORDER_SETTINGS = ("train.seed", "model.seq_length", "sequences.packing")
FREE_MODEL_SETTINGS = ("model.name", "model.init_std")
# How the run is monitored and stored: a change of these is not reported at a resume.
UNTOLD = ("run", "logging", "generate", "select", "bench", "export", "import", "cluster", "fault.replanned")


@dataclass(frozen=True)
class Start:
    """The point at which a run starts.

    path: checkpoint to load; None for fresh weights.
    damaged: newer checkpoints that were passed over, each with what is wrong with it.
    finished: whether there is nothing left to do.
    changed: {setting: (value when the checkpoint was made, value now)}.
    records: of the sources that the run has had so far (data/record.py).
    """

    path: Path | None
    state: TrainState = TrainState()  # noqa: RUF009 - frozen
    damaged: tuple[str, ...] = ()
    finished: bool = False
    changed: Changes = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)


def find_start(config: Config, prepared: PreparedData, data: OpenedData, everyone: Tree) -> Start:
    """Find the start of the run in its run directory, before anything expensive is done.

    Collective: all ranks share the verification of the checkpoint.
    """
    run = RunDirectory(Path(config.run.dir), create=False)
    paths = on_main_rank(everyone, lambda: candidates(run.checkpoints_path, config.checkpoint))
    choice = choose(paths, lambda path: find_damage_together(path, everyone))
    if choice.path is None:
        refuse_exhausted(config, data.training, TrainState())
        return on_main_rank(everyone, lambda: _start_without_checkpoint(config, run))
    path = choice.path
    manifest = read_manifest(path)
    refuse_other_job(config, prepared, data, manifest, path)
    state = saved_state(manifest)
    refuse_exhausted(config, data.training, state)
    return Start(
        path,
        state,
        choice.damaged,
        finished=manifest.step >= config.train.steps,
        changed=changed_settings(manifest.details["config"], to_plain(config), without=UNTOLD),
        records=(manifest.details["data"] or {}).get("sources", {}),
    )


def saved_state(manifest: Manifest) -> TrainState:
    """Return the state in a checkpoint. An imported model has none, since it has seen none of our data."""
    state = manifest.details.get("state")
    return TrainState.from_plain(state) if state else TrainState(manifest.step)


def restore(engine: Engine, path: Path) -> None:
    """Load weights and optimizer states. Collective."""
    manifest = read_manifest(path)
    refuse_other_model(manifest, engine, path)
    states = {name: getattr(torch, dtype) for name, dtype in manifest.states.items()}
    read_tensors(path, engine.fragments(create_states=states))
    engine.after_load(manifest.scalars)


def refuse_other_model(manifest: Manifest, engine: Engine, path: Path) -> None:
    """Raise a user error with the differences if the checkpoint is of another model.

    That happens before anything is overwritten. All parameters of this rank are compared, also those that it
    holds no fragment of: if only some ranks refused, the others would wait for them.
    """
    differences = []
    for place in engine.places.values():
        shape = manifest.tensors.get(place.name)
        if shape is None:
            differences.append(f"{place.name} is not in the checkpoint")
        elif shape != place.global_shape:
            differences.append(f"{place.name} is {shape} there and {place.global_shape} here")
    if differences:
        shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if differences[5:] else "")
        raise user_error(
            "checkpoint",
            path,
            f"the checkpoint must be of the same model and vocabulary, but {shown}",
            "take the model and tokenizer that the checkpoint was made with, or another run.dir",
        )


def find_damage_together(path: Path, everyone: Tree) -> str | None:
    """Run `find_damage` on all ranks, each reading its share of the files. Collective."""
    return everyone.first(find_damage(path, share=(dist.get_rank(), dist.get_world_size())))


def _start_without_checkpoint(config: Config, run: RunDirectory) -> Start:
    """Return a start with fresh weights, or a finished one: a job without checkpoints may be complete."""
    status = run.read_status() or {}
    done = status.get("step", 0) if status.get("state") == "completed" else 0
    is_finished = config.checkpoint.resume == "auto" and done >= config.train.steps
    return Start(None, TrainState(done) if is_finished else TrainState(), finished=is_finished)


def refuse_other_job(
    config: Config, prepared: PreparedData, data: OpenedData, manifest: Manifest, path: Path
) -> None:
    """Raise a user error if the order of the data or the model is not that of the checkpoint.

    With another order of the data, samples would be lost or repeated. The model is compared by its settings,
    since nothing is built yet; `restore` compares every shape.
    """
    before, now = settings(manifest.details["config"]), settings(to_plain(config))
    is_trained = manifest.details["data"] is not None  # not just imported
    # Earlier formats do not hold the family's name; `restore` compares all that follows from it.
    free = {*FREE_MODEL_SETTINGS, *(["model.family"] if manifest.format_version < 4 else [])}
    problems = []
    for setting, value in before.items():
        if setting in ORDER_SETTINGS and is_trained:
            reason = "the order of the data hangs on it"
        elif setting.startswith("model.") and setting not in free:
            reason = "the weights hang on it"
        else:
            continue
        if now.get(setting) != value:
            rule = f"{reason}, and {path.name} was made with {value}"
            problems.append(
                Problem(setting, now.get(setting), rule, f"{setting}={value}, or another run.dir")
            )
    if is_trained:
        problems += _other_sources(config, prepared, data, manifest, path)
    if problems:
        raise UserError(problems)


def _other_sources(
    config: Config, prepared: PreparedData, data: OpenedData, manifest: Manifest, path: Path
) -> Iterator[Problem]:
    """Yield a problem for each source that has changed since samples were drawn from it.

    A source that is new, or was not drawn from yet, may be anything; one that is gone is simply not drawn
    from any more.
    """
    before = manifest.details["data"]["sources"]
    consumed = saved_state(manifest).consumed_by_source()
    for name in (name for name in data.records if name in before and consumed.get(name)):
        source, record = prepared.sources[name], before[name]
        if record["fingerprint"] != source.fingerprint:
            rule = f"its tokens must be those of {path.name}; what changed: {what_changed(record, source)}"
            fix = "restore the documents and the tokenizer, give the new documents a source of their own, "
            yield Problem(
                config.data.place(name),
                f"fingerprint {source.fingerprint}",
                rule,
                f"{fix}or take another run.dir",
            )
        if record["shuffle"] != data.records[name]["shuffle"]:
            setting, before_text = f"{config.data.place(name)}.shuffle", str(record["shuffle"]).lower()
            rule = f"the order of source {name} hangs on it, and {path.name} was made with {before_text}"
            fix = f"{setting}={before_text}, or another run.dir"
            yield Problem(setting, data.records[name]["shuffle"], rule, fix)
