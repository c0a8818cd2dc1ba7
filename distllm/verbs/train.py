"""`distllm train`: pretrain a model; the same command again resumes."""

from __future__ import annotations

import math
import operator
import time
from datetime import timedelta
from pathlib import Path

from distllm.config.compose import Request, config_hash, to_yaml
from distllm.config.problems import EXIT_PREEMPTED
from distllm.config.schema import Config
from distllm.data.preparation.prepare import prepare
from distllm.data.prepared import PreparedData
from distllm.layout.grid import Grid
from distllm.layout.groups import create_groups, destroy_groups
from distllm.metrics.run_directory import RunDirectory
from distllm.metrics.run_lock import RunLock
from distllm.runtime import dist
from distllm.runtime.activity import Activity
from distllm.runtime.devices import warning_of_precision
from distllm.runtime.dist import Runtime
from distllm.runtime.launcher import is_plain_torchrun, is_under_agent, seconds_since_start
from distllm.runtime.signals import StopRequest
from distllm.runtime.watchdog import Place, Reports, Watchdog, prepare_folder
from distllm.trainer.describe import describe_start, finish_outputs
from distllm.trainer.inject import parse
from distllm.trainer.job import Job, build_job
from distllm.trainer.loop import fit
from distllm.trainer.open_data import OpenedData, open_data
from distllm.trainer.reporter import Reporter, report_progress
from distllm.trainer.resume import Start, find_start

# Beyond the deadlines of the watchdog, which speaks first and says more than a collective's timeout.
MORE_THAN_A_VERDICT_SECONDS = 120


def run(config: Config, request: Request) -> int:
    """One process of the job, on every rank alike; returns its exit code."""
    for injection in config.fault.inject:
        parse(injection)  # refused before anything is done
    # Before the world exists: a long preparation is no hang. The ranks of a node take turns by a file lock.
    report = report_progress if dist.is_main() else lambda _: None
    prepared = prepare(config.data, config.preparation, config.tokenizer, report)
    data = open_data(config, prepared, report)
    timeout = timedelta(seconds=2 * config.fault.hang_seconds + MORE_THAN_A_VERDICT_SECONDS)
    runtime = dist.start(timeout, config.parallel.tensor)
    succeeded, exit_code = False, 0
    lock, stop_request = _RunLock(Path(config.run.dir)), StopRequest()
    try:
        dist.assert_equal_on_all_ranks(runtime.everyone, "config", config_hash(config))
        dist.on_main_rank(runtime.everyone, lock.take_if_there)
        start = find_start(config, prepared, data, runtime.everyone)
        if start.finished:
            _say_finished(config, start, runtime)
        else:
            dist.on_main_rank(runtime.everyone, lock.take)
            exit_code = _train(config, runtime, prepared, data, start, stop_request)
        succeeded = True
    finally:
        lock.release()
        dist.stop(runtime, succeeded)
        stop_request.close()
    return exit_code


class _RunLock:
    """Rank 0's lock on the run directory: taken before anything is read there; a new directory is made only
    for a job that starts."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._lock: RunLock | None = None

    def take_if_there(self) -> None:
        if self._run_dir.is_dir():
            self.take()

    def take(self) -> None:
        RunDirectory(self._run_dir)  # made, and known to be writable
        self._lock = self._lock or RunLock(self._run_dir)

    def release(self) -> None:
        if self._lock:
            self._lock.release()


def _train(
    config: Config,
    runtime: Runtime,
    prepared: PreparedData,
    data: OpenedData,
    start: Start,
    stop_request: StopRequest,
) -> int:
    grid = Grid.of(config.parallel, runtime.world_size)
    previous_sign = RunDirectory(Path(config.run.dir), create=False).last_sign()
    reporter = Reporter(config, runtime.is_main, start.state.step)
    _open_run(config, runtime, prepared, start, reporter, previous_sign)
    reporter.say(describe_start(config, prepared, data, grid, start))
    begin = time.monotonic()
    run_dir, activity, job = Path(config.run.dir), Activity(), None
    folder = dist.on_main_rank(runtime.everyone, lambda: prepare_folder(run_dir))
    place = Place(run_dir, folder, runtime.rank, runtime.local_rank, runtime.world_size)
    reports = Reports(reporter.hang, reporter.failed, reporter.straggler)
    fault = config.fault
    watchdog = Watchdog(activity, place, fault.hang_seconds, fault.grace_seconds, stop_request, reports)
    watchdog.start()
    try:
        groups = create_groups(grid, runtime.timeout, config.parallel.virtual_pipeline)
        job = build_job(config, runtime, groups, prepared, data, start, reporter, stop_request, activity)
        end = fit(job)
        activity.begin("end", end.step, patience_seconds=math.inf)
        reporter.close()
        if end.step < config.train.steps:
            exit_code = _say_preempted(end.step, job)
            watchdog.stop()
            return exit_code
        finish_outputs(job, time.monotonic() - begin)
        reporter.status("completed", "all steps are done", step=config.train.steps)
        reporter.event("stop", "all steps are done", step=config.train.steps)
        watchdog.stop()
        return 0
    except BaseException as error:
        failure = watchdog.fail(error)
        reporter.close()
        if failure is not error:
            raise failure from None
        raise
    finally:
        if job:
            job.batches.close()
        destroy_groups()


def _say_preempted(step: int, job: Job) -> int:
    """The exit code of a job that stopped because it was asked to, and can go on.

    torchrun restarts whatever ends with another code than 0: under its agent only `status.json` tells.
    """
    name = job.stop_request.reason
    own = [f"{name} on rank {job.runtime.rank}"] if name else []
    reason = f"asked to stop by {', '.join(job.runtime.everyone.agree(own, operator.add))}"
    job.reporter.status("preempted", reason, step=step)
    job.reporter.event("stop", reason, step=step, state="preempted")
    job.reporter.say(
        f"stopped after step {step} of {job.config.train.steps}: {reason}. The same command goes on."
    )
    return 0 if is_under_agent() else EXIT_PREEMPTED


def _open_run(
    config: Config,
    runtime: Runtime,
    prepared: PreparedData,
    start: Start,
    reporter: Reporter,
    previous_sign: float | None,
) -> None:
    """Make the run directory tell how this start came about."""
    if not runtime.is_main:
        return
    reporter.run.write_config(to_yaml(config))
    reporter.run.write_environment(
        {"world_size": runtime.world_size, "device": str(runtime.device), "data": prepared.fingerprints}
    )
    for damage in start.damaged:
        reporter.event("damaged checkpoint", damage)
        reporter.say(f"WARNING: a damaged checkpoint was passed over: {damage}")
    if config.fault.replanned:
        reporter.event("replanned", config.fault.replanned)
        reporter.say(f"WARNING: another layout than asked for, on {config.fault.replanned}")
    if start.changed:
        changed = {name: f"{before} -> {now}" for name, (before, now) in start.changed.items()}
        reporter.event("changed settings", "the command line differs from the checkpoint's", **changed)
        reporter.say(f"changed since the checkpoint: {', '.join(f'{k}: {v}' for k, v in changed.items())}")
    if is_plain_torchrun():
        reporter.warn(
            "started by plain torchrun, under which a failed rank cannot be restarted in place "
            "(pytorch#135712): use launch/torchrun.sh, which takes the same arguments"
        )
    if warning := warning_of_precision(runtime.device, config.train.precision):
        reporter.warn(warning)
    origin = f"resumed from {start.path}" if start.path else "from scratch"
    reporter.event(
        "start",
        origin,
        step=start.state.step,
        world_size=runtime.world_size,
        process_started=round(time.time() - seconds_since_start(), 3),
        previous_sign=previous_sign,
        lost_steps=reporter.lost_work.steps,
        lost_seconds=round(reporter.lost_work.seconds, 3),
    )
    reporter.status("running", origin, step=start.state.step)


def _say_finished(config: Config, start: Start, runtime: Runtime) -> None:
    if runtime.is_main:
        print(f"{config.run.dir} is complete: {start.state.step:,} of {config.train.steps:,} steps are done.")
        print("To go on, raise train.steps; to start afresh, choose another run.dir.", flush=True)
