"""Tokenize the units of a corpus in several processes; any of them, or all, may be killed at any time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from queue import Empty, SimpleQueue

from distllm.config.problems import user_error
from distllm.config.registry import load_plugins
from distllm.data.preparation.pieces import Work, remove_unfinished, write_piece
from distllm.data.preparation.progress import PROGRESS_SECONDS, Counters, Progress
from distllm.data.tokenizer import CHARACTERS_PER_BATCH, TextTokenizer
from distllm.runtime.launcher import die_with

# This process alone, on all cores, is done with a smaller corpus before workers have even started.
FEWEST_UNITS = 16
THREADS_PER_WORKER = 2
# A worker has one core, so smaller batches, which need less memory, keep it busy.
CHARACTERS_PER_WORKER_BATCH = 1 << 20
MOST_DEATHS = 3  # in a row, without a piece made meanwhile


@dataclass(frozen=True)
class _Pool:
    """The size of a pool of workers. num_threads: of each worker's tokenizer."""

    num_workers: int
    num_threads: int


def make_pieces(
    work: Work,
    indices: Sequence[int],
    num_workers: int | None,
    tokenizer: TextTokenizer,
    report: Callable[[str], None],
) -> None:
    """Make those of the pieces `indices` that are not there yet.

    num_workers: None means one for every two processor cores. User error: workers that are killed again and
    again. BadInputError: see `write_piece`.
    """
    work.folder.mkdir(exist_ok=True)
    remove_unfinished(work)
    num_bytes = sum(work.units[index].num_bytes for index in indices)
    remaining = work.missing(indices)
    counters = Counters(len(work.units))
    bytes_before = num_bytes - sum(work.units[index].num_bytes for index in remaining)
    progress = Progress(counters, num_bytes, bytes_before, report)
    if len(remaining) < len(indices):
        report(f"continues with {len(remaining):,} of {len(indices):,} pieces; the others are complete")
    num_cores = len(os.sched_getaffinity(0))
    if num_workers is None:
        # Threads of one process share the tokenizer's caches, but Python code runs in one thread at a time:
        # two threads were faster than two processes (0.93 of the bare tokenizer's rate and 0.80), many would
        # not be.
        num_workers = max(1, num_cores // THREADS_PER_WORKER)
    if num_workers == 1 or len(remaining) < FEWEST_UNITS:
        _make_here(work, remaining, tokenizer, counters, progress)
    else:
        pool = _Pool(num_workers, max(1, num_cores // num_workers))
        _make_in_workers(work, remaining, pool, counters, progress, report)


def _make_here(
    work: Work, indices: list[int], tokenizer: TextTokenizer, counters: Counters, progress: Progress
) -> None:
    for index in indices:
        count = counters.of_unit(index, work.units[index].num_bytes)

        def advance(num_bytes: int, num_tokens: int) -> None:
            count(num_bytes, num_tokens)  # noqa: B023  # called before the next turn of the loop
            progress.show()

        write_piece(work, index, tokenizer, CHARACTERS_PER_BATCH, advance)
        counters.finish(index, work.units[index].num_bytes)


def _make_in_workers(
    work: Work,
    indices: list[int],
    size: _Pool,
    counters: Counters,
    progress: Progress,
    report: Callable[[str], None],
) -> None:
    remaining, num_deaths = indices, 0
    while remaining:
        try:
            _run_pool(work, remaining, size, counters, progress)
        except BrokenProcessPool:
            num_before, remaining = len(remaining), work.missing(remaining)
            num_deaths = 1 if len(remaining) < num_before else num_deaths + 1
            if num_deaths == MOST_DEATHS:
                rule = f"{num_deaths} workers have died, one after another; the system may lack memory"
                raise user_error(
                    "preparation.workers", size.num_workers, rule, "fewer workers; finished pieces are kept"
                ) from None
            report("a worker was killed; its pieces are made anew")
        else:
            return


def _run_pool(work: Work, indices: list[int], size: _Pool, counters: Counters, progress: Progress) -> None:
    """Run the pool. BrokenProcessPool: a worker was killed; the executor then ends the others."""
    counters.stop.value = 0
    # Not by fork: this process may have threads, of torch among others, that hold locks.
    pool = ProcessPoolExecutor(
        min(size.num_workers, len(indices)),
        get_context("spawn"),
        initializer=_start,
        initargs=(work, counters, os.getpid(), size.num_threads),
    )
    with pool:
        try:
            done: SimpleQueue[Future[None]] = SimpleQueue()
            for future in _submit(pool, indices):
                future.add_done_callback(done.put)
            num_done = 0
            while num_done < len(indices):
                # Not by concurrent.futures.wait: an interrupt in it (3.11) leaves futures locked, and then
                # the pool waits for ever.
                with suppress(Empty):
                    done.get(timeout=PROGRESS_SECONDS).result()
                    num_done += 1
                progress.show()
        except BaseException:
            counters.stop.value = 1  # else shutdown waits until the workers have finished their units
            pool.shutdown(cancel_futures=True)  # waits: no worker may run when our lock is free
            raise


def _submit(pool: ProcessPoolExecutor, indices: list[int]) -> list[Future[None]]:
    # The workers start here and inherit blocked signals: only this process handles Ctrl-C in the terminal.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return [pool.submit(_make, index) for index in indices]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# The arguments that a worker was started with.
_worker: tuple[Work, Counters, TextTokenizer]


def _start(work: Work, counters: Counters, parent: int, num_threads: int) -> None:
    global _worker
    die_with(parent)
    load_plugins()
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(num_threads)
    _worker = work, counters, TextTokenizer.load(work.tokenizer_folder, work.end_of_document)


def _make(index: int) -> None:
    work, counters, tokenizer = _worker
    num_bytes = work.units[index].num_bytes
    write_piece(work, index, tokenizer, CHARACTERS_PER_WORKER_BATCH, counters.of_unit(index, num_bytes))
    counters.finish(index, num_bytes)
