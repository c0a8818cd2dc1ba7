"""A job assembled from its parts: data, model, engine, reporter, and the state from which it starts."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from distllm.config.schema import Config
from distllm.data.loader import StepShape
from distllm.data.prepared import PreparedData
from distllm.engine.engine import Engine
from distllm.layout.groups import Groups
from distllm.lineage.ledger import LedgerFile
from distllm.model.parameters import flops_per_token
from distllm.objectives import create_objective
from distllm.runtime.activity import Activity
from distllm.runtime.devices import peak_flops
from distllm.runtime.dist import Runtime
from distllm.runtime.signals import StopRequest
from distllm.trainer.batches import Batches
from distllm.trainer.build import build_engine
from distllm.trainer.checkpointing import Checkpoints
from distllm.trainer.evaluate import Validation, create_validation
from distllm.trainer.inject import Injector
from distllm.trainer.open_data import OpenedData
from distllm.trainer.reporter import Reporter
from distllm.trainer.resume import Start, restore
from distllm.trainer.state import TrainState


@dataclass
class Job:
    """Everything that training needs, on one rank.

    start: how far training had come when the job began.
    flops_per_token: of the whole model, for MFU.
    peak_flops: of all devices together, for MFU; None if it is unknown.
    """

    config: Config
    runtime: Runtime
    groups: Groups
    prepared: PreparedData
    data: OpenedData
    batches: Batches
    ledger: LedgerFile
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

    def patient(self, phase: str) -> AbstractContextManager[None]:
        """Return a context for work that reports no progress: it may take as long as a save may."""
        return self.activity.patient(phase, self.config.checkpoint.timeout_seconds)


def build_job(
    config: Config,
    runtime: Runtime,
    groups: Groups,
    prepared: PreparedData,
    data: OpenedData,
    start: Start,
    reporter: Reporter,
    stop_request: StopRequest,
    activity: Activity,
) -> Job:
    """Build all parts and load the checkpoint that `start` names. Collective."""
    train = config.train
    shape = StepShape(train.global_batch_size, train.micro_batch_size, groups.samples.size)
    prefetch = config.sequences.prefetch
    objective = create_objective(config)
    batches = Batches(data.training, shape, groups.samples.rank, objective, runtime.device, prefetch)
    validation = create_validation(config, prepared, data.validation)
    engine = build_engine(
        config,
        prepared.vocab_size,
        groups,
        runtime.device,
        objective,
        reporter.warn,
        draws=start.path is None,
    )
    if start.path is not None:
        restore(engine, start.path)
    records = start.records | data.records
    device_peak = peak_flops(runtime.device, config.train.precision)
    return Job(
        config=config,
        runtime=runtime,
        groups=groups,
        prepared=prepared,
        data=data,
        batches=batches,
        ledger=LedgerFile(
            reporter.run.ledger_path if reporter.is_main else None, config, records, reporter.warn
        ),
        validation=validation,
        engine=engine,
        reporter=reporter,
        checkpoints=Checkpoints(config, engine, prepared, records, reporter, start.state),
        start=start.state,
        activity=activity,
        injector=Injector(config.fault.inject, runtime.rank),
        stop_request=stop_request,
        flops_per_token=flops_per_token(config.model, prepared.vocab_size),
        peak_flops=device_peak * runtime.world_size if device_peak else None,
    )
