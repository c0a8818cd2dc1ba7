"""What a rank needs beside its model to save and to load it: peaks of anonymous memory on gloo ranks."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import jobs
import torch
from anonymous import PeakAnonymous

from distllm.checkpoint.async_writer import Saver
from distllm.checkpoint.manifest import find_damage
from distllm.checkpoint.pieces import pieces_of
from distllm.checkpoint.store import Contents
from distllm.layout.save_groups import create_save_groups
from distllm.trainer.resume import restore

MOMENTS = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}


@dataclass(frozen=True)
class SavingMemory:
    """Bytes. whole: weights and moments of the model. share: what this rank writes of it. largest_piece: of
    its share. peaks: {what it did: the most that it needed for that beside the model}."""

    whole: int
    share: int
    largest_piece: int
    peaks: dict[str, int]


def measure_saving(rank: int, folder: Path, overrides: tuple[str, ...]) -> SavingMemory:
    """Save at once, twice in the background (the second time into the memory of the first) and load."""
    engine = jobs.build_engine(jobs.make_config(*overrides))
    for fragment in engine.fragments(create_states=MOMENTS):
        for tensor in fragment.tensors.values():
            tensor.normal_()  # touched: what was never written takes no memory
    groups = create_save_groups(engine.groups.grid, timedelta(seconds=300))
    contents = Contents(1, {"step": 1.0}, {})
    pieces = pieces_of(fragment for fragment in engine.fragments() if fragment.writer)
    sizes = [piece.view.nbytes for piece in pieces]
    share = torch.tensor([sum(sizes)])
    del pieces
    torch.distributed.all_reduce(share)
    path = folder / "step_00000001"
    peaks: dict[str, int] = {}
    saver = Saver(groups, is_async=True)
    savers = {
        "save at once": Saver(groups, is_async=False),
        "first save in the background": saver,
        "next save in the background": saver,
    }
    for name, saver in savers.items():
        with PeakAnonymous() as memory:
            saver.save(path, engine.fragments(), contents, after=lambda: None)
            saver.wait()
        (outcome,) = saver.outcomes()
        assert outcome.error is None, outcome.error
        peaks[name] = memory.extra_bytes
    del savers, saver
    with PeakAnonymous() as memory:
        assert find_damage(path) is None
    peaks["verify"] = memory.extra_bytes
    with PeakAnonymous() as memory:
        restore(engine, path)
    peaks["load"] = memory.extra_bytes
    torch.distributed.barrier()
    if rank == 0:
        shutil.rmtree(path)
    jobs.finish(engine)
    return SavingMemory(int(share), sum(sizes), max(sizes), peaks)
