"""Saves in the background: of the moment they were asked for, one at a time, and never silently lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from torch import Tensor

from distllm.checkpoint import async_writer as saver_module
from distllm.checkpoint.async_writer import Saver
from distllm.checkpoint.retention import checkpoint_path
from distllm.checkpoint.store import Contents, SaveFailedError, read_tensors, write_pieces
from distllm.layout.fragment import Fragment
from distllm.layout.place import Place
from distllm.layout.save_groups import SaveGroups

PLACE = Place("layer.weight", (5, 7), (5, 7), (0, 0), primary=True)


def fragments(weight: Tensor, state: Tensor) -> list[Fragment]:
    """Two types, and a range that is no box."""
    return [
        Fragment(PLACE, a, b, {"weight": weight[a:b], "exp_avg": state[a:b]}, writer=True)
        for a, b in ((0, 9), (9, 35))
    ]


def read(path: Path) -> tuple[Tensor, Tensor]:
    weight, state = torch.zeros(35), torch.zeros(35, dtype=torch.bfloat16)
    read_tensors(path, fragments(weight, state))
    return weight, state


class Gate:
    """Holds writes back until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def write(self, *arguments: object) -> None:
        assert self.opened.wait(20)
        write_pieces(*arguments)  # type: ignore[arg-type]


def move_on_while_writing(rank: int, folder: Path) -> None:
    gate = Gate()
    saver_module.write_pieces = gate.write  # type: ignore[assignment]
    saver, done = Saver(SaveGroups(), is_async=True), list[int]()
    weight, state = torch.arange(35.0), torch.arange(35).bfloat16()
    expected = []
    for step in (1, 2):
        if step == 2:
            threading.Timer(0.2, gate.opened.set).start()  # the second save waits for the first
        expected.append((weight.clone(), state.clone()))
        saver.save(
            checkpoint_path(folder, step),
            fragments(weight, state),
            Contents(step, {}, {}),
            after=lambda step=step: done.append(step),  # type: ignore[misc]
        )
        if step == 1:
            assert saver.outcomes() == []
            assert done == []
        weight.add_(1)  # training goes on, in place
        state.mul_(2)
    saver.wait()
    outcomes = saver.outcomes()
    assert [outcome.step for outcome in outcomes] == done == [1, 2]
    assert all(outcome.error is None for outcome in outcomes)
    assert all(outcome.num_bytes == 35 * (4 + 2) for outcome in outcomes)
    assert outcomes[0].seconds >= 0.2 > outcomes[0].blocking_seconds
    assert outcomes[1].blocking_seconds >= 0.1, "it waited for the first"
    for step, (a, b) in zip((1, 2), expected, strict=True):
        found = read(checkpoint_path(folder, step))
        assert torch.equal(found[0], a)
        assert torch.equal(found[1], b)


def test_a_save_is_of_its_moment_and_waits_for_the_one_before(tmp_path: Path) -> None:
    run_ranks(1, move_on_while_writing, tmp_path)


def save_and_wait(saver: Saver, save: Callable[[], None]) -> None:
    save()
    saver.wait()


def fail_in_turn(rank: int, folder: Path, is_async: bool) -> None:
    errors: list[Exception | None] = [SaveFailedError("rank 0: disk full"), None, ValueError("a bug")]

    def failing(*arguments: object) -> None:
        if error := errors.pop(0):
            raise error

    saver_module.write_pieces = failing  # type: ignore[assignment]
    saver = Saver(SaveGroups(), is_async)
    weight, state = torch.zeros(35), torch.zeros(35)

    def save(step: int) -> None:
        saver.save(
            checkpoint_path(folder, step), fragments(weight, state), Contents(step, {}, {}), lambda: None
        )

    save(1)
    save(2)
    saver.wait()
    assert [outcome.error for outcome in saver.outcomes()] == ["rank 0: disk full", None]
    with pytest.raises(ValueError, match="a bug"):
        save_and_wait(saver, lambda: save(3))
    saver.wait()


@pytest.mark.parametrize("is_async", [True, False])
def test_a_full_disk_is_told_and_a_bug_is_raised(is_async: bool, tmp_path: Path) -> None:
    run_ranks(1, fail_in_turn, tmp_path, is_async)
