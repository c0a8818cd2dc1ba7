"""Ranks agree or fail together, and the harness that all rank tests rest on tells when they do not."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest
import torch
import torch.distributed
from harness import RanksFailedError, run_ranks

from distllm.config.problems import UserError, user_error
from distllm.layout.tree import WORLD
from distllm.runtime import dist
from distllm.runtime.devices import refuse_late_visitors


def ask_main_rank(rank: int) -> tuple[int, str]:
    """A result and a refusal; each is made on rank 0 only."""
    result = dist.on_main_rank(WORLD, lambda: 40 + torch.distributed.get_rank())

    def refuse() -> None:
        assert torch.distributed.get_rank() == 0
        raise user_error("run.dir", "x", "must be y", "run.dir=y")

    try:
        dist.on_main_rank(WORLD, refuse)
    except UserError as error:
        return result, str(error)
    return result, "nothing was raised"


def test_what_the_main_rank_finds_or_refuses_holds_on_all() -> None:
    results = run_ranks(3, ask_main_rank)
    message = str(user_error("run.dir", "x", "must be y", "run.dir=y"))
    assert results == [(40, message)] * 3


def compare(rank: int) -> str:
    dist.assert_equal_on_all_ranks(WORLD, "config", "same")
    try:
        dist.assert_equal_on_all_ranks(WORLD, "config", "odd" if rank == 2 else "same")
    except UserError as error:
        return str(error)
    return "nothing was raised"


def test_a_difference_is_seen_by_all_ranks_and_named() -> None:
    messages = run_ranks(3, compare)
    assert len(set(messages)) == 1
    assert "config=same on rank 0, odd on rank 2" in messages[0]
    assert "ranks [2] differ" in messages[0]


def visit_a_gpu(rank: int) -> str:
    try:
        refuse_late_visitors(2 if rank == 1 else 1, rank, WORLD)
    except UserError as error:
        return str(error)
    return "nothing was raised"


def test_a_shared_gpu_is_refused_by_all_ranks_alike() -> None:
    messages = run_ranks(3, visit_a_gpu)
    assert len(set(messages)) == 1
    assert "ranks [1] share a GPU with an earlier rank" in messages[0]


def raise_on_rank_1(rank: int) -> None:
    print(f"rank {rank} was here", flush=True)
    if rank == 1:
        raise ValueError("a bug on this rank")
    torch.distributed.barrier()


def test_a_rank_that_raises_fails_the_test_with_its_log() -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, raise_on_rank_1)
    message = str(caught.value)
    assert message.startswith("rank 1: ValueError: a bug on this rank")
    assert "rank 1 was here" in message
    assert "in raise_on_rank_1" in message, "the traceback is there too"


def die_on_rank_1(rank: int) -> None:
    if rank == 1:
        os._exit(7)
    torch.distributed.barrier()


def test_a_rank_that_dies_without_a_word_fails_the_test() -> None:
    """The other rank may notice the lost connection before the harness sees the end of the process."""
    with pytest.raises(RanksFailedError, match=r"rank 1: died with exit code 7|rank 0: RuntimeError"):
        run_ranks(2, die_on_rank_1)


def hang_on_rank_1(rank: int, folder: Path) -> None:
    (folder / str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        print("about to hang", flush=True)
        time.sleep(3600)


def test_a_rank_that_hangs_is_ended_at_the_deadline(tmp_path: Path) -> None:
    begin = time.monotonic()
    # Rank 0 waits in the barrier of dist.stop, so both are late.
    with pytest.raises(RanksFailedError, match=r"ranks \[0, 1\] hung for 8 s") as caught:
        run_ranks(2, hang_on_rank_1, tmp_path, deadline_seconds=8)
    assert time.monotonic() - begin < 20
    assert "about to hang" in str(caught.value)
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def is_single(rank: int) -> tuple[int, bool, str]:
    return torch.distributed.get_world_size(), dist.is_main(), torch.distributed.get_backend()


def test_a_world_of_one_is_a_world() -> None:
    assert run_ranks(1, is_single) == [(1, True, "gloo")]


def file_limits(rank: int) -> tuple[int, int]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(64, hard), hard))
    dist.raise_file_limit()
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def test_as_many_files_as_the_hard_limit_allows() -> None:
    ((soft, hard),) = run_ranks(1, file_limits)
    assert soft == hard
