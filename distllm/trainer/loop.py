"""The training loop."""

from __future__ import annotations

import time

from distllm.engine.engine import Limits, StepResult
from distllm.engine.schedule import learning_rate
from distllm.metrics.meter import Row, training_row
from distllm.runtime.activity import Noted
from distllm.runtime.launcher import seconds_since_start
from distllm.trainer.evaluate import validate
from distllm.trainer.guards import limits
from distllm.trainer.job import Job
from distllm.trainer.pending_rows import PendingRows
from distllm.trainer.profile import StepProfiler
from distllm.trainer.recovery import Recovery
from distllm.trainer.state import TrainState


def fit(job: Job) -> TrainState:
    """Train from the job's first step to its last, or to where it is asked to stop; returns where that is."""
    config, reporter = job.config, job.reporter
    state = job.start
    recovery, rows = Recovery(job), PendingRows(reporter)
    reporter.event("ready", "the first step begins", start_up_seconds=round(seconds_since_start(), 3))
    job.checkpoints.warn_of_short_grace()
    saving_seconds, wants_stop = 0.0, False
    with StepProfiler(job) as profiler:
        while state.step < config.train.steps and not wants_stop:
            job.stop_request.check_interrupt()
            state = state.planned(config.train.global_batch_size, config.data.weights_at(state.step))
            job.ledger.keep(state.history, state.skipped)
            profiler.before_step(state.step + 1)
            began, allowed = time.perf_counter(), limits(state, config.fault)
            with profiler.step(state.step + 1):
                result = train_step(job, state, allowed)
            seconds, timings = time.perf_counter() - began, job.engine.phases.end_step()
            profiler.after_step(state.step + 1, seconds, timings)
            wants_stop = result.wants_stop
            if not result.is_applied:
                be_patient(job, state)  # a rewind reads a checkpoint
                rows.flush()
                state = recovery.after_refusal(result, allowed, state, seconds)
                continue
            recovery.after_success()
            before, state = state, after_step(job, state, result)
            row = make_row(job, before, state, result, seconds) | {"checkpoint_seconds": saving_seconds}
            rows.add(row | ({"profiled": True} if profiler.is_active else {}), timings)
            be_patient(job, state)
            validate_if_due(job, state, rows)
            saving_seconds = save_if_due(job, state, rows)
        profiler.stop()
        rows.flush()
        be_patient(job, state)
        if wants_stop:
            job.checkpoints.save_to_stop(state)
        job.checkpoints.finish()
    return state


def after_step(job: Job, state: TrainState, result: StepResult) -> TrainState:
    train, window = job.config.train, job.config.fault.spike_window
    return state.after_step(train.global_batch_size, result.loss, result.grad_norm, window)


def train_step(job: Job, state: TrainState, allowed: Limits) -> StepResult:
    """One optimizer update, if what comes out is within `allowed`."""
    samples = state.samples(job.config.train.global_batch_size)
    job.activity.begin("train", state.step, (samples.start, samples.stop))
    job.engine.gradient_watch.injected_factor = job.injector.before_step(state.step, samples)
    with job.engine.phases.phase("data"):
        microbatches = job.batches.microbatches(state)
    return job.engine.train_step(
        Noted(microbatches, job.activity),
        rate_of(job, state),
        allowed,
        wants_stop=job.stop_request.reason is not None,
    )


def validate_if_due(job: Job, state: TrainState, rows: PendingRows) -> None:
    train = job.config.train
    if job.validation and is_due(state.step, train.validation_interval, train.steps):
        rows.flush()
        began = time.perf_counter()
        row = validate(job.engine, job.validation, state.step)
        job.reporter.validation_row(row | {"validation_seconds": time.perf_counter() - began})


def save_if_due(job: Job, state: TrainState, rows: PendingRows) -> float:
    """Seconds for which training stands still."""
    began = time.perf_counter()
    job.checkpoints.report()
    if is_due(state.step, job.config.checkpoint.interval, job.config.train.steps):
        rows.flush()
        job.checkpoints.save(state, "interval")
    return time.perf_counter() - began


def be_patient(job: Job, state: TrainState) -> None:
    """Validation, saving and loading show no progress on the way; none may take longer than a save may."""
    patience = job.config.checkpoint.timeout_seconds
    job.activity.begin("validate, save or load", state.step, patience_seconds=patience)


def rate_of(job: Job, state: TrainState) -> float:
    config = job.config
    return learning_rate(
        state.step, peak=config.optimizer.lr, total_steps=config.train.steps, schedule=config.schedule
    )


def make_row(job: Job, before: TrainState, state: TrainState, result: StepResult, seconds: float) -> Row:
    """The row of the step that led from `before` to `state`."""
    return training_row(
        step=state.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=rate_of(job, before),
        consumed_samples=state.consumed_samples,
        consumed_by_source=state.consumed_by_source() if len(job.data.records) > 1 else {},
        step_seconds=seconds,
        global_batch_size=job.config.train.global_batch_size,
        seq_length=job.config.model.seq_length,
        flops_per_token=job.flops_per_token,
        peak_flops=job.peak_flops,
        peak_memory_bytes=job.runtime.peak_memory_bytes(),
    )


def is_due(done: int, interval: int, total: int) -> bool:
    """Every `interval` steps and at the last one; an interval of 0 means never."""
    return interval > 0 and (done % interval == 0 or done == total)
