"""The training loop."""

from __future__ import annotations

import time

import torch

from distllm.engine.pipeline import Microbatch
from distllm.engine.schedule import learning_rate
from distllm.metrics.meter import Row, training_row
from distllm.trainer.evaluate import validate
from distllm.trainer.job import Job
from distllm.trainer.state import TrainState


def fit(job: Job) -> None:
    """Train from the job's first step to its last."""
    config, reporter, state = job.config, job.reporter, job.start
    while state.step < config.train.steps:
        row = train_step(job, state)
        state = state.after_step(config.train.global_batch_size)
        reporter.training_row(row)
        if job.validation and is_due(state.step, config.train.validation_interval, config.train.steps):
            reporter.validation_row(validate(job.engine, job.validation, state.step))
        job.checkpoints.report()
        if is_due(state.step, config.checkpoint.interval, config.train.steps):
            job.checkpoints.save(state, "interval")
    job.checkpoints.finish()


def train_step(job: Job, state: TrainState) -> Row:
    """One optimizer update; returns its row of metrics."""
    config = job.config
    start = time.perf_counter()
    rate = learning_rate(
        state.step, peak=config.optimizer.lr, total_steps=config.train.steps, schedule=config.schedule
    )
    result = job.engine.train_step(load_microbatches(job, state), rate)
    return training_row(
        step=state.step + 1,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=rate,
        consumed_samples=state.next_sample + config.train.global_batch_size,
        step_seconds=time.perf_counter() - start,
        global_batch_size=config.train.global_batch_size,
        seq_length=config.model.seq_length,
        flops_per_token=job.flops_per_token,
        peak_flops=job.peak_flops,
        peak_memory_bytes=job.runtime.peak_memory_bytes(),
    )


def load_microbatches(job: Job, state: TrainState) -> list[Microbatch]:
    """This rank's part of the next global batch, on its device."""
    arrays = job.batches.microbatches(
        state.next_sample,
        job.groups.coordinates.data,
        global_batch_size=job.config.train.global_batch_size,
        micro_batch_size=job.config.train.micro_batch_size,
        dp_size=job.groups.grid.data,
    )
    return [Microbatch(torch.from_numpy(tokens).to(job.runtime.device)) for tokens in arrays]


def is_due(done: int, interval: int, total: int) -> bool:
    """Every `interval` steps and at the last one; an interval of 0 means never."""
    return interval > 0 and (done % interval == 0 or done == total)
