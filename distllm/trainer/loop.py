"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from distllm.config.schema import Config
from distllm.engine.engine import Limits, StepResult
from distllm.runtime.activity import Noted
from distllm.runtime.launcher import seconds_since_start
from distllm.trainer.evaluate import validate
from distllm.trainer.guards import limits
from distllm.trainer.job import Job
from distllm.trainer.observer import StepObserver, rate_of
from distllm.trainer.recovery import Recovery
from distllm.trainer.state import TrainState


def fit(job: Job) -> TrainState:
    """Train until the last step, or until the job is asked to stop; return the state at that point."""
    config, state, recovery = job.config, job.start, Recovery(job)
    job.reporter.event("ready", "the first step begins", start_up_seconds=round(seconds_since_start(), 3))
    job.checkpoints.warn_of_short_grace()
    wants_stop = False
    with StepObserver(job) as observer:
        while state.step < config.train.steps and not wants_stop:
            job.stop_request.check_interrupt()
            state = state.planned(config.train.global_batch_size, config.data.weights_at(state.step))
            job.ledger.keep(state.history, state.skipped)
            allowed = limits(state, config.fault)
            with observer.step(state.step + 1):
                result = take_step(job, state, allowed)
            wants_stop = result.wants_stop
            if not result.is_applied:
                observer.flush()
                with job.patient("recover"):  # a rewind reads a checkpoint
                    state = recovery.after_refusal(result, allowed, state, observer.seconds)
                continue
            recovery.after_success()
            before, state = state, after_step(job, state, result)
            observer.write_row(before, state, result)
            do_what_is_due(job, state, observer)
        observer.finish()
        with job.patient("save"):
            if wants_stop:
                job.checkpoints.save_to_stop(state)
            job.checkpoints.finish()
    return state


def take_step(job: Job, state: TrainState, allowed: Limits) -> StepResult:
    """Do one optimizer update, if its loss and gradient norm are within `allowed`."""
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


def after_step(job: Job, state: TrainState, result: StepResult) -> TrainState:
    train, window = job.config.train, job.config.fault.spike_window
    return state.after_step(train.global_batch_size, result.loss, result.grad_norm, window)


@dataclass(frozen=True)
class Due:
    """Work that is done every `interval` steps and after the last one; an interval of 0 means never.

    name: of the phase that is reported if the job hangs in it.
    """

    name: str
    interval: Callable[[Config], int]
    do: Callable[[Job, TrainState, StepObserver], None]

    def is_due(self, config: Config, step: int) -> bool:
        interval = self.interval(config)
        return interval > 0 and (step % interval == 0 or step == config.train.steps)


def _validate(job: Job, state: TrainState, _: StepObserver) -> None:
    if job.validation:
        began = time.perf_counter()
        row = validate(job.engine, job.validation, state.step)
        job.reporter.validation_row(row | {"validation_seconds": time.perf_counter() - began})


def _save(job: Job, state: TrainState, observer: StepObserver) -> None:
    with observer.between_steps("checkpoint_seconds"):
        job.checkpoints.save(state, "interval")


# After a step, in this order.
DUE_AFTER_STEP = (
    Due("validate", lambda config: config.train.validation_interval, _validate),
    Due("save", lambda config: config.checkpoint.interval, _save),
)


def do_what_is_due(job: Job, state: TrainState, observer: StepObserver) -> None:
    job.checkpoints.report()
    for due in DUE_AFTER_STEP:
        if due.is_due(job.config, state.step):
            observer.flush()
            with job.patient(due.name):
                due.do(job, state, observer)
