"""`distllm checkpoint list|show|verify|prune run.dir=DIR`: what a run has saved, without torch.

What is not given of `checkpoint.keep` and `checkpoint.keep_every` is the run's own, as its newest checkpoint
was made, and not our default: a forgotten `keep_every` must not remove what was to stay for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from distllm.checkpoint.manifest import Manifest, read_manifest
from distllm.checkpoint.retention import checkpoint_path, is_kept_for_good, list_checkpoints, remove, step_of
from distllm.checkpoint.survey import Entry, bytes_on_disk, look_at, plan_pruning, survey
from distllm.config.compose import Request, load
from distllm.config.problems import Problem, UserError, user_error
from distllm.config.schema import Checkpoint, Config
from distllm.metrics.format import bytes_, duration, plural
from distllm.metrics.run_directory import RunDirectory
from distllm.metrics.run_lock import RunLock
from distllm.verbs.checkpoint_report import difference_text, list_text, prune_text, show_text

EXIT_DAMAGED = 1
LOCK_SECONDS = 1.0  # a running job holds it for as long as it runs
NOTHING_SELECTED = {"step": None, "against": None, "dry_run": False}
USED = {"list": (), "show": ("step", "against"), "verify": ("step",), "prune": ("dry_run",)}


def run(config: Config, request: Request) -> int:
    """Do `request.action`; 1 where `verify` finds damage."""
    assert request.action is not None, "the command line was read"
    _refuse_unused(request.action, config)
    folder = RunDirectory(Path(config.run.dir), create=False).checkpoints_path
    return ACTIONS[request.action](folder, load(_with_own_retention(request, folder)))


def _refuse_unused(action: str, config: Config) -> None:
    """`prune select.step=8` must not remove something else than what was meant."""
    problems = []
    for name, default in NOTHING_SELECTED.items():
        value = getattr(config.select, name)
        if value != default and name not in USED[action]:
            users = " and ".join(user for user, names in USED.items() if name in names)
            problems.append(
                Problem(
                    f"select.{name}", value, f"means nothing to {action}, only to {users}", "leave it out"
                )
            )
    if problems:
        raise UserError(problems)


def _with_own_retention(request: Request, folder: Path) -> Request:
    """The request with the run's retention before what was given, which so comes first."""
    for path in reversed(list_checkpoints(folder)):
        with suppress(OSError, ValueError, KeyError, TypeError):
            made_with = read_manifest(path).details["config"]["checkpoint"]
            own = [f"checkpoint.{name}={int(made_with[name])}" for name in ("keep", "keep_every")]
            return replace(request, overrides=(*own, *request.overrides))
    return request


def _list(folder: Path, config: Config) -> int:
    entries = survey(folder)
    print(list_text(entries, _for_good(config.checkpoint)) if entries else f"no checkpoints in {folder}")
    return 0


def _for_good(settings: Checkpoint) -> Callable[[Entry], bool]:
    return lambda entry: entry.state != "unfinished" and is_kept_for_good(entry.path, settings)


def _show(folder: Path, config: Config) -> int:
    step, against = config.select.step, config.select.against
    existing = list_checkpoints(folder)
    if step is None and not existing:
        print(f"no checkpoints in {folder}")
        return 0
    entry, manifest = _readable(existing[-1] if step is None else _of_step(folder, step))
    texts = [show_text(entry, manifest)]
    if against is not None:
        path = _of_step(folder, int(against)) if against.isdecimal() else Path(against).expanduser()
        texts.append(difference_text(_readable(path)[1], manifest, str(path)))
    print("\n\n".join(texts))
    return 0


def _verify(folder: Path, config: Config) -> int:
    step = config.select.step
    paths = [entry.path for entry in survey(folder)] if step is None else [_of_step(folder, step)]
    if not paths:
        print(f"no checkpoints in {folder}")
    num_damaged = 0
    for path in paths:
        begin = time.monotonic()
        entry = look_at(path, thorough=True)
        num_damaged += entry.state == "damaged"
        read = f"{bytes_(entry.num_bytes)} read in {duration(time.monotonic() - begin)}"
        told = f"good, {read}" if entry.state == "complete" else entry.state
        print(f"{path.name}: {told}", flush=True)
        for problem in entry.problems:
            print(f"    {problem}", flush=True)
    return EXIT_DAMAGED if num_damaged else 0


def _prune(folder: Path, config: Config) -> int:
    """Under the run's lock, so that no job starts from, or replaces, what is going."""
    settings, is_dry = config.checkpoint, config.select.dry_run
    lock = RunLock(Path(config.run.dir), LOCK_SECONDS)
    try:
        plan = plan_pruning(folder, settings)
        sizes = {path.name: bytes_on_disk(path) for path in plan.removed}
        for path in plan.removed if not is_dry else []:
            remove(path)
    except OSError as error:
        rule = f"must be a folder that can be read and written: {error}"
        raise user_error("run.dir", config.run.dir, rule, "see to the disk, then prune again") from error
    finally:
        lock.release()
    for_good = f"those of every {settings.keep_every:,} steps" if settings.keep_every else "none"
    rule = f"the newest {plural(settings.keep, 'good checkpoint')} stay, for good {for_good}"
    print(prune_text(plan, sizes, rule, is_done=not is_dry))
    return 0


def _of_step(folder: Path, step: int) -> Path:
    path = checkpoint_path(folder, step)
    if not path.is_dir():
        steps = ", ".join(str(step_of(path)) for path in list_checkpoints(folder)) or "none"
        rule = f"must be the step of a checkpoint of this run; there are: {steps}"
        raise user_error("select", step, rule, "name one of them")
    return path


def _readable(path: Path) -> tuple[Entry, Manifest]:
    """User errors: another format, or no manifest that makes sense."""
    entry = look_at(path)
    if entry.manifest is None:
        why = entry.problems[0] if entry.problems else entry.state
        raise user_error("checkpoint", path, f"must say what it holds: {why}", "name another: select.step=N")
    return entry, entry.manifest


ACTIONS: dict[str, Callable[[Path, Config], int]] = {
    "list": _list,
    "show": _show,
    "verify": _verify,
    "prune": _prune,
}
