"""The modelled number of chunks against what gloo ranks write, and what the largest jobs come to."""

from __future__ import annotations

import gc
import io
import math
import tracemalloc
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import jobs
import pytest
import torch
from harness import run_ranks
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from distllm.checkpoint.dcp import METADATA, Record, read_metadata, write_metadata
from distllm.checkpoint.store import read_tensors, write_checkpoint
from distllm.config import compose
from distllm.config.schema import Config
from distllm.layout.fragment import Fragment
from distllm.layout.place import Box, Place, Shape, flat_range_boxes
from distllm.plan.checkpoint_metadata import (
    CHUNK_BYTES_IN_MEMORY,
    CHUNK_BYTES_ON_DISK,
    chunks_by_module,
)
from distllm.plan.rank_view import RankView

MOMENTS = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
STAGES = ("zero.stage=0", "zero.stage=1", "zero.stage=2", "zero.stage=3")
TENSOR, PIPELINE = "parallel.tensor=2", "parallel.pipeline=2"
GPT2 = (
    "model.bias=true",
    "model.normalization=layernorm",
    "model.position_embedding=learned",
    "model.activation=gelu",
)
BATCH_OF_3 = ("train.global_batch_size=12", "train.micro_batch_size=1")
# 9 norms of 63: a third of them ends with a norm, but partitions are of even length and end behind it.
ODD = (
    "model.hidden_size=63",
    "model.num_attention_heads=3",
    "model.num_query_groups=3",
    "model.position_embedding=learned",
    "model.num_layers=4",
)
# World size: overrides of each job beside its ZeRO stage
LAYOUTS: dict[int, tuple[tuple[str, ...], ...]] = {
    1: ((),),
    2: ((), (TENSOR,), (PIPELINE,), (*GPT2, TENSOR), (PIPELINE, "model.tie_embeddings=true")),
    3: (BATCH_OF_3, (*BATCH_OF_3, *GPT2), (*BATCH_OF_3, *ODD), (*BATCH_OF_3, "train.precision=bf16")),
    4: (
        (),
        (TENSOR,),
        (PIPELINE, "parallel.virtual_pipeline=2"),
        (TENSOR, PIPELINE),
        ("train.precision=bf16", "zero.persistence_threshold=1000"),
        (*GPT2, TENSOR, "model.tie_embeddings=true"),
    ),
}

LLAMA_VOCABULARY = 128_256
LARGEST_BYTES = 100_000_000
NUM_CHUNKS = 3000


def write_and_model(rank: int, folder: Path, cases: list[tuple[str, ...]]) -> list[Counter[str]]:
    """Save each job as folder/<number of the case>; returns what the model says."""
    modelled = []
    for number, case in enumerate(cases):
        config = jobs.make_config(*case)
        engine = jobs.build_engine(config)
        fragments = engine.fragments(create_states=MOMENTS)
        write_checkpoint(folder / str(number), fragments, step=1, scalars={}, details={})
        modelled.append(chunks_by_module(config, jobs.VOCAB_SIZE, engine.groups.grid))
        jobs.finish(engine)
    return modelled


def written_metadata(path: Path) -> dict[str, Metadata]:
    found = {}
    for file in path.glob(f"tensors/*/{METADATA}"):
        with open(file, "rb") as stream:
            found[file.parent.name] = read_metadata(stream)
    return found


def num_chunks(metadata: Metadata) -> int:
    tensors = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
    return sum(len(tensor.chunks) for tensor in tensors.values())


@pytest.mark.long
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_ranks_write_as_many_chunks_as_are_modelled(world_size: int, tmp_path: Path) -> None:
    cases = [(stage, *layout) for layout in LAYOUTS[world_size] for stage in STAGES]
    modelled = run_ranks(world_size, write_and_model, tmp_path, cases, deadline_seconds=240)[0]
    for number, case in enumerate(cases):
        written = written_metadata(tmp_path / str(number))
        assert {module: num_chunks(m) for module, m in written.items()} == modelled[number], case


def layer_records(config: Config, dp_size: int) -> list[Record]:
    """What all ranks have written of one layer under ZeRO-3, as its metadata is made from it."""
    hidden, ffn, tensor = config.model.hidden_size, config.model.ffn_hidden_size, config.parallel.tensor
    cut: dict[str, tuple[Shape, int]] = {  # local shape, dim that tensor parallelism cuts
        "self_attention.linear_proj.weight": ((hidden, hidden // tensor), 1),
        "self_attention.linear_qkv.weight": ((9 * hidden // 8 // tensor, hidden), 0),
        "mlp.linear_fc1.weight": ((2, ffn // tensor, hidden), 1),
        "mlp.linear_fc2.weight": ((hidden, ffn // tensor), 1),
    }
    records: list[Record] = []
    for name, (shape, dim) in cut.items():
        whole = tuple(n * tensor if i == dim else n for i, n in enumerate(shape))
        part = -(-math.prod(shape) // dp_size)
        for rank in range(tensor * dp_size):
            start = rank // tensor * part
            for box in flat_range_boxes(shape, start, min(start + part, math.prod(shape))):
                offsets = list(box.offsets)
                offsets[dim] += rank % tensor * shape[dim]
                placed = Box(tuple(offsets), box.sizes)
                for state in ("weight", *MOMENTS):
                    file = f"../../shards/rank_{rank:05}.distcp"
                    offset = 1_000_000 * len(records)
                    key = f"decoder.layers.100.{name}"
                    records.append(
                        Record(state, key, whole, torch.float32, placed, file, offset, 4 * placed.numel)
                    )
    return records


def llama_405b(zero_stage: int) -> Config:
    """As it was trained on 16,384 GPUs: tensor 8, pipeline 16, data 128."""
    overrides = (
        "model=llama3_405b",
        f"tokenizer.vocab_size={LLAMA_VOCABULARY}",
        "train.precision=bf16",
        "train.global_batch_size=2048",
        "train.micro_batch_size=1",
        "parallel.tensor=8",
        "parallel.sequence=true",
        "parallel.pipeline=16",
        "parallel.embedding_as_layer=true",
        "parallel.loss_as_layer=true",
        f"zero.stage={zero_stage}",
        "world_size=16384",
    )
    return compose.load(compose.parse("check", overrides))


def test_a_chunk_takes_what_the_model_says() -> None:
    """A layer of 405B as 1024 ranks write it; cut in 127 it has the boxes of uneven ends."""
    for dp_size in (128, 127):
        records = layer_records(llama_405b(3), dp_size)
        stream = io.BytesIO()
        write_metadata(stream, records)
        on_disk = stream.tell() / len(records)
        stream.seek(0)
        in_memory = _peak(partial(read_metadata, stream)) / len(records)
        # Not above the model, and not so far below that it says nothing.
        assert 0.8 * CHUNK_BYTES_ON_DISK < on_disk <= CHUNK_BYTES_ON_DISK
        assert 0.8 * CHUNK_BYTES_IN_MEMORY < in_memory <= CHUNK_BYTES_IN_MEMORY


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_no_reader_of_405b_needs_100_mb(zero_stage: int) -> None:
    """A reader holds the metadata of one module at a time, of which it may need any part. Twice what is
    measured still fits; and so does, under cuts as uneven as can be, what is measured."""
    config = llama_405b(zero_stage)
    grids = {dp: RankView.of(config, LLAMA_VOCABULARY, dp, 0).grid for dp in (128, 127)}
    largest = {
        dp: max(chunks_by_module(config, LLAMA_VOCABULARY, grid).values()) for dp, grid in grids.items()
    }
    assert 2 * largest[128] * CHUNK_BYTES_IN_MEMORY < LARGEST_BYTES
    assert largest[127] * CHUNK_BYTES_IN_MEMORY < LARGEST_BYTES


def test_one_list_of_all_chunks_would_need_gigabytes() -> None:
    """Why there is one for each module."""
    grid = RankView.of(llama_405b(3), LLAMA_VOCABULARY, 128, 0).grid
    total = sum(chunks_by_module(llama_405b(3), LLAMA_VOCABULARY, grid).values())
    assert total == 1_660_800
    assert total * CHUNK_BYTES_IN_MEMORY > 30 * LARGEST_BYTES


def read_and_trace(rank: int, path: Path) -> tuple[int, int]:
    """Most bytes that it takes to read something of one module, and of each of three."""
    places = [
        Place(f"decoder.layers.{layer}.weight", (NUM_CHUNKS,), (NUM_CHUNKS,), (0,), primary=True)
        for layer in range(3)
    ]
    weight = torch.arange(NUM_CHUNKS, dtype=torch.float32)
    written = [
        Fragment(place, i, i + 1, {"weight": weight[i : i + 1]}, writer=True)
        for place in places
        for i in range(NUM_CHUNKS)
    ]
    write_checkpoint(path, written, step=1, scalars={}, details={})
    wanted = [Fragment(place, 0, 1, {"weight": torch.empty(1)}, writer=False) for place in places]
    read_tensors(path, wanted)  # once, for what it leaves behind
    return _peak(lambda: read_tensors(path, wanted[:1])), _peak(lambda: read_tensors(path, wanted))


def _peak(work: Callable[[], object]) -> int:
    gc.collect()
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_reader_holds_one_module_at_a_time(tmp_path: Path) -> None:
    one, three = run_ranks(1, read_and_trace, tmp_path / "step_00000001")[0]
    assert one > NUM_CHUNKS * CHUNK_BYTES_IN_MEMORY / 2
    assert three < 1.1 * one
