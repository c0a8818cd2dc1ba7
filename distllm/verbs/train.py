"""`distllm train`: pretrain a model; the same command again resumes."""

from __future__ import annotations

import time
from datetime import timedelta

from distllm.config.compose import config_hash, to_yaml
from distllm.config.schema import Config
from distllm.data.prepare import PreparedData, prepare
from distllm.layout.grid import Grid
from distllm.layout.groups import create_groups, destroy_groups
from distllm.runtime import dist
from distllm.runtime.dist import Runtime
from distllm.trainer.describe import describe_start, finish_outputs
from distllm.trainer.job import build_job, refuse_short_data
from distllm.trainer.loop import fit
from distllm.trainer.reporter import Reporter, report_progress
from distllm.trainer.resume import Start, find_start


def run(config: Config) -> int:
    """One process of the job, on every rank alike; returns its exit code."""
    # Before the world exists: a long preparation is no hang. The ranks of a node take turns by a file lock.
    prepared = prepare(config.data, config.tokenizer, report_progress if dist.is_main() else lambda _: None)
    refuse_short_data(config, prepared)
    runtime = dist.start(timedelta(seconds=config.fault.hang_seconds))
    succeeded = False
    try:
        dist.assert_equal_on_all_ranks("config", config_hash(config))
        start = dist.on_main_rank(lambda: find_start(config, prepared))
        if start.finished:
            _say_finished(config, start, runtime)
        else:
            _train(config, runtime, prepared, start)
        succeeded = True
    finally:
        dist.stop(succeeded)
    return 0


def _train(config: Config, runtime: Runtime, prepared: PreparedData, start: Start) -> None:
    grid = Grid.from_world_size(
        runtime.world_size, tensor=config.parallel.tensor, pipeline=config.parallel.pipeline
    )
    reporter = Reporter(config, runtime.is_main, start.step)
    _open_run(config, runtime, prepared, start, reporter)
    reporter.say(describe_start(config, prepared, grid, start))
    begin = time.monotonic()
    groups = create_groups(grid, runtime.timeout, config.parallel.virtual_pipeline)
    try:
        job = build_job(config, runtime, groups, prepared, start, reporter)
        fit(job)
        reporter.close()
        finish_outputs(job, time.monotonic() - begin)
        reporter.status("completed", "all steps are done", step=config.train.steps)
        reporter.event("stop", "all steps are done", step=config.train.steps)
    except BaseException as error:
        reporter.status("failed", f"{type(error).__name__}: {error}")
        reporter.event("stop", f"{type(error).__name__}: {error}")
        reporter.close()
        raise
    finally:
        destroy_groups()


def _open_run(
    config: Config, runtime: Runtime, prepared: PreparedData, start: Start, reporter: Reporter
) -> None:
    """Make the run directory tell how this start came about."""
    if not runtime.is_main:
        return
    reporter.run.write_config(to_yaml(config))
    reporter.run.write_environment(
        {"world_size": runtime.world_size, "device": str(runtime.device), "data": prepared.fingerprint}
    )
    for damage in start.damaged:
        reporter.event("damaged checkpoint", damage)
        reporter.say(f"WARNING: a damaged checkpoint was passed over: {damage}")
    origin = f"resumed from {start.path}" if start.path else "from scratch"
    reporter.event("start", origin, step=start.step, world_size=runtime.world_size)
    reporter.status("running", origin, step=start.step)


def _say_finished(config: Config, start: Start, runtime: Runtime) -> None:
    if runtime.is_main:
        print(f"{config.run.dir} is complete: {start.step:,} of {config.train.steps:,} steps are done.")
        print("To go on, raise train.steps; to start afresh, choose another run.dir.", flush=True)
