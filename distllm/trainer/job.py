"""A job put together: data, model, engine and reporter, and the point at which it starts."""

from __future__ import annotations

from dataclasses import dataclass

from distllm.config.schema import Config
from distllm.data.loader import Batches
from distllm.data.prepared import PreparedData
from distllm.engine.create import create_engine
from distllm.engine.engine import Engine
from distllm.layout.groups import Groups
from distllm.model.build import build_model
from distllm.model.size import flops_per_token
from distllm.runtime.activity import Activity
from distllm.runtime.devices import peak_flops
from distllm.runtime.dist import Runtime
from distllm.runtime.signals import StopRequest
from distllm.trainer.evaluate import Validation, create_validation
from distllm.trainer.inject import Injector
from distllm.trainer.reporter import Reporter
from distllm.trainer.resume import Start, restore
from distllm.trainer.saving import Checkpoints
from distllm.trainer.state import TrainState


@dataclass
class Job:
    """Everything that training needs, on one rank.

    start: how far training had come when the job began. flops_per_token, peak_flops: for MFU, of the whole
    model and of all devices together; peak_flops is None where it is unknown.
    """

    config: Config
    runtime: Runtime
    groups: Groups
    prepared: PreparedData
    batches: Batches
    validation: Validation | None
    engine: Engine
    reporter: Reporter
    checkpoints: Checkpoints
    start: TrainState
    activity: Activity
    injector: Injector
    stop_request: StopRequest
    flops_per_token: float
    peak_flops: float | None


def refuse_short_data(config: Config, prepared: PreparedData) -> None:
    """A user error unless each split holds a sequence: before the run directory tells of a start."""
    validates = prepared.validation is not None and config.train.validation_interval > 0
    for split in (prepared.train, prepared.validation if validates else None):
        if split is not None:
            Batches(split, config.model.seq_length, config.train.seed)


def build_job(
    config: Config,
    runtime: Runtime,
    groups: Groups,
    prepared: PreparedData,
    start: Start,
    reporter: Reporter,
    stop_request: StopRequest,
    activity: Activity,
) -> Job:
    """Build all parts and load the checkpoint that `start` names. Collective."""
    batches = Batches(prepared.train, config.model.seq_length, config.train.seed)
    validation = create_validation(config, prepared)
    built = build_model(config, prepared.vocab_size, groups, runtime.device)
    engine = create_engine(built.chunks, built.places, config, groups)
    if start.path is not None:
        restore(engine, start.path)
    device_peak = peak_flops(runtime.device, config.train.precision)
    return Job(
        config=config,
        runtime=runtime,
        groups=groups,
        prepared=prepared,
        batches=batches,
        validation=validation,
        engine=engine,
        reporter=reporter,
        checkpoints=Checkpoints(config, engine, prepared, reporter, start.state),
        start=start.state,
        activity=activity,
        injector=Injector(config.fault.inject, runtime.rank),
        stop_request=stop_request,
        flops_per_token=flops_per_token(config.model, prepared.vocab_size),
        peak_flops=device_peak * runtime.world_size if device_peak else None,
    )
