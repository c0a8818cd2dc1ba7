"""Recovery after a refused step: the same samples again, the next ones, or back to a checkpoint."""

from __future__ import annotations

import operator

from distllm.checkpoint.manifest import read_manifest
from distllm.checkpoint.retention import choose, list_checkpoints
from distllm.engine.engine import Limits, StepResult
from distllm.runtime.dist import on_main_rank
from distllm.trainer.guards import Action, Decision, decide, is_finite
from distllm.trainer.job import Job
from distllm.trainer.resume import find_damage_together, restore, saved_state
from distllm.trainer.state import TrainState


class DivergedError(RuntimeError):
    """Too many steps were refused: something is wrong that skipping samples does not repair."""


class Recovery:
    """Carries out what the guard decides: the same on every rank, since the numbers are equal on all."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._refused_in_a_row = 0
        self._tries = 0
        self._num_rewinds = 0

    def after_success(self) -> None:
        self._refused_in_a_row = self._tries = 0

    def after_refusal(
        self, result: StepResult, allowed: Limits, state: TrainState, seconds: float
    ) -> TrainState:
        """Return the state from which to go on. Collective. seconds: time that the refused step took."""
        decision = decide(
            result,
            allowed,
            self._job.config.fault,
            refused_in_a_row=self._refused_in_a_row,
            tries=self._tries,
            num_rewinds=self._num_rewinds,
        )
        samples = state.samples(self._job.config.train.global_batch_size)
        self._tell(decision, result, state, samples, seconds)
        self._refused_in_a_row += 1
        self._tries = self._tries + 1 if decision.action is Action.RETRY else 0
        if decision.action is Action.GIVE_UP:
            raise DivergedError(decision.reason)
        if decision.action is Action.RETRY:
            return state
        if decision.action is Action.REWIND:
            return self._rewind(state, samples)
        return state.without(samples)

    def _rewind(self, state: TrainState, samples: range) -> TrainState:
        """Go back to the newest good checkpoint and leave out these samples.

        If there is no checkpoint, go on from here without them.
        """
        job = self._job
        self._num_rewinds += 1
        job.checkpoints.wait()
        folder = job.reporter.run.checkpoints_path
        everyone = job.runtime.everyone
        paths = on_main_rank(everyone, lambda: list_checkpoints(folder)[::-1])
        choice = choose(paths, lambda path: find_damage_together(path, everyone))
        if choice.path is None:
            job.reporter.event(
                "rewind", "there is no checkpoint yet: the samples are skipped", step=state.step
            )
            return state.without(samples)
        restore(job.engine, choice.path)
        saved = saved_state(read_manifest(choice.path))
        for first, end in state.skipped:  # by other rewinds and skips since the checkpoint
            saved = saved.without(range(first, end)) if (first, end) not in saved.skipped else saved
        lost = job.reporter.rewind(saved.step)
        job.reporter.event(
            "rewind",
            f"back from step {state.step} to {choice.path.name}",
            step=saved.step,
            lost_steps=lost.steps,
            lost_seconds=lost.seconds,
            skipped_samples=[samples.start, samples.stop],
        )
        return saved.without(samples)

    def _tell(
        self, decision: Decision, result: StepResult, state: TrainState, samples: range, seconds: float
    ) -> None:
        culprits = [] if is_finite(result) else self._first_non_finite()
        self._job.reporter.event(
            "step refused",
            decision.reason,
            action=decision.action.value,
            step=state.step,
            samples=[samples.start, samples.stop],
            loss=result.loss,
            grad_norm=result.grad_norm,
            seconds=seconds,
            first_non_finite=[{"rank": rank, "what": what} for rank, what in culprits],
        )
        where = "".join(f"; first on rank {rank}: {what}" for rank, what in culprits[:1])
        self._job.reporter.warn(
            f"step {state.step + 1} refused, {decision.action.value}: {decision.reason}{where}"
        )

    def _first_non_finite(self) -> list[tuple[int, str]]:
        """Return (rank, what was not finite first on it) for each rank where something was. Collective."""
        runtime, what = self._job.runtime, self._job.engine.gradient_watch.first_non_finite()
        return runtime.everyone.agree([(runtime.rank, what)] if what else [], operator.add)
