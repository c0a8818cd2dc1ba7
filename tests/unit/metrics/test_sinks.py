"""metrics.jsonl, TensorBoard and W&B: each step once, whatever killed the run before."""

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from distllm.config.problems import UserError
from distllm.metrics.jsonl import dump_line, load_line
from distllm.metrics.run_directory import RunDirectory
from distllm.metrics.sinks import MetricsWriter, read_rows


def writer(
    run: RunDirectory, resume_step: int = 0, *, tensorboard: bool = False, wandb: bool = False
) -> MetricsWriter:
    return MetricsWriter(
        run,
        tensorboard=tensorboard,
        wandb=wandb,
        wandb_project="project",
        config={"seed": 1},
        resume_step=resume_step,
        warn=print,
    )


def write_steps(sink: MetricsWriter, first: int, last: int, loss: float) -> None:
    for step in range(first, last + 1):
        sink.write({"step": step, "loss": loss})
        if step % 2 == 0:
            sink.write({"step": step, "validation_loss": loss, "validation_bits_per_byte": 1.5})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def test_rows_can_be_read_while_the_run_goes_on(run: RunDirectory) -> None:
    sink = writer(run)
    sink.write({"step": 1, "loss": 2.5})
    assert read_rows(run.metrics_path) == [{"step": 1, "loss": 2.5}]
    sink.close()
    sink.close()


def test_a_resume_keeps_each_step_once(run: RunDirectory) -> None:
    write_steps(writer(run), 1, 7, loss=3.0)
    with open(run.metrics_path, "ab") as file:
        file.write(b'{"step": 8, "lo')
    write_steps(writer(run, resume_step=4), 5, 8, loss=2.0)
    rows = read_rows(run.metrics_path)
    assert [(r["step"], r["loss"]) for r in rows if "loss" in r] == [
        *[(step, 3.0) for step in range(1, 5)],
        *[(step, 2.0) for step in range(5, 9)],
    ]
    assert [r["step"] for r in rows if "validation_loss" in r] == [2, 4, 6, 8]


def test_a_start_from_scratch_drops_all_rows(run: RunDirectory) -> None:
    sink = writer(run)
    sink.write({"step": 0, "validation_loss": 9.0})
    write_steps(sink, 1, 2, loss=3.0)
    writer(run, resume_step=0)
    assert read_rows(run.metrics_path) == []


def test_a_torn_last_line_is_left_out(run: RunDirectory) -> None:
    run.metrics_path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_rows(run.metrics_path) == [{"step": 1, "loss": 2.0}]
    assert read_rows(run.path / "absent.jsonl") == []


def test_a_torn_middle_line_is_an_error_that_names_it(run: RunDirectory) -> None:
    run.metrics_path.write_bytes(b'{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl"):
        read_rows(run.metrics_path)


def test_strict_json_readers_survive_a_nan(run: RunDirectory) -> None:
    sink = writer(run)
    sink.write({"step": 1, "loss": math.nan, "grad_norm": -math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    raw = json.loads(run.metrics_path.read_text(), parse_constant=refuse)
    assert raw == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "non_finite": {"loss": "nan", "grad_norm": "-inf"},
    }
    (row,) = read_rows(run.metrics_path)
    assert math.isnan(row["loss"])
    assert row["grad_norm"] == -math.inf
    assert set(row) == {"step", "loss", "grad_norm"}


NAMES = st.text(min_size=1).filter(lambda name: name != "non_finite")


@given(st.dictionaries(NAMES, st.integers() | st.floats() | st.text() | st.none() | st.booleans()))
def test_a_line_gives_back_the_row(row: dict[str, Any]) -> None:
    line = dump_line(row)
    assert line.index(b"\n") == len(line) - 1
    assert repr(load_line(line)) == repr(row)  # repr: NaN differs from itself, -0.0 equals 0.0


@given(st.dictionaries(NAMES, st.floats(), min_size=1), st.data())
def test_no_torn_line_passes_for_a_row(row: dict[str, Any], data: st.DataObject) -> None:
    line = dump_line(row)
    torn = line[: data.draw(st.integers(0, len(line) - 2))]
    with pytest.raises(ValueError):  # noqa: PT011 - json's message differs with the place
        load_line(torn)


def curve(run: RunDirectory, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(run.tensorboard_path), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(point.step, point.value) for point in accumulator.Scalars(tag)]


def test_tensorboard_draws_each_step_once_after_a_resume(run: RunDirectory) -> None:
    write_steps(writer(run, tensorboard=True), 1, 7, loss=3.0)  # killed: never closed
    (event_file,) = run.tensorboard_path.iterdir()
    with open(event_file, "ab") as file:
        file.write(b"\x18\x00\x00")  # a torn record
    sink = writer(run, resume_step=4, tensorboard=True)
    write_steps(sink, 5, 8, loss=2.0)
    sink.close()
    assert curve(run, "train/loss") == [(s, 3.0) for s in range(1, 5)] + [(s, 2.0) for s in range(5, 9)]
    assert curve(run, "validation/loss") == [(2, 3.0), (4, 3.0), (6, 2.0), (8, 2.0)]
    assert curve(run, "validation/bits_per_byte")[0] == (2, 1.5)


def test_tensorboard_forgets_an_earlier_start(run: RunDirectory) -> None:
    write_steps(writer(run, tensorboard=True), 1, 5, loss=3.0)
    write_steps(writer(run, tensorboard=True), 1, 2, loss=2.0)
    assert curve(run, "train/loss") == [(1, 2.0), (2, 2.0)]


def test_wandb_that_is_not_installed_is_refused_before_rows_are_dropped(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps(writer(run), 1, 1, loss=3.0)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'distllm\[wandb\]'") as caught:
        writer(run, wandb=True)
    assert caught.value.problems[0].setting == "logging.wandb"
    assert len(read_rows(run.metrics_path)) == 1


class FakeWandb(types.ModuleType):
    """Records what the real one would be told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> "FakeWandb":
        self.inits.append(arguments)
        return self

    def log(self, scalars: dict[str, Any], step: int) -> None:
        self.logged.append((scalars, step))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_resumes_the_same_run_and_a_new_start_is_a_new_one(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_step in (0, 1, 0):
        sink = writer(run, resume_step, wandb=True)
        sink.write({"step": resume_step + 1, "loss": 2.0})
        sink.close()
    first, resumed, restarted = (arguments["id"] for arguments in fake.inits)
    assert first == resumed != restarted
    assert {arguments["resume"] for arguments in fake.inits} == {"allow"}
    assert fake.inits[0]["project"] == "project"
    assert fake.inits[0]["config"] == {"seed": 1}
    assert fake.logged == [({"train/loss": 2.0}, 1), ({"train/loss": 2.0}, 2), ({"train/loss": 2.0}, 1)]
    assert fake.finished == 3
