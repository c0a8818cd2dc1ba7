"""What verbs read of a checkpoint beside its tensors."""

from __future__ import annotations

import os
from pathlib import Path

from distllm.checkpoint.manifest import Manifest, find_damage
from distllm.checkpoint.retention import candidates, choose
from distllm.config.problems import user_error
from distllm.config.schema import Config, Parallel
from distllm.metrics.run_directory import RunDirectory
from distllm.trainer.reporter import report_progress

SINGLE = Parallel()


def refuse_launcher(verb: str) -> None:
    """A user error where `verb`, which runs in one process, was started as several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise user_error("WORLD_SIZE", os.environ["WORLD_SIZE"], f"{verb} runs in one process", "no launcher")


def checkpoint_to_read(config: Config) -> Path:
    """The checkpoint that `checkpoint.resume` names, else the newest good one of `run.dir`."""
    if config.checkpoint.resume not in ("auto", "never"):
        # Not as training reads it, which goes on with the checkpoints of run.dir where it has some.
        named = Path(config.checkpoint.resume).expanduser()
        if damage := find_damage(named):
            rule = f"a complete checkpoint is needed, but {damage}"
            raise user_error("checkpoint.resume", named, rule, "name another one")
        return named
    run_directory = RunDirectory(Path(config.run.dir), create=False)
    choice = choose(candidates(run_directory.checkpoints_path, config.checkpoint))
    for damage in choice.damaged:
        report_progress(f"WARNING: a damaged checkpoint was passed over: {damage}")
    if choice.path is None:
        raise user_error(
            "run.dir", config.run.dir, "must hold a checkpoint", "name the run.dir of a run that saved one"
        )
    return choice.path


def tokenizer_folder(checkpoint: Path, manifest: Manifest) -> Path:
    """Where the tokenizer of a checkpoint lies."""
    return checkpoint / str(manifest.details["tokenizer"]["folder"])
