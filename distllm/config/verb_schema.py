"""The settings of single verbs, typed: `distllm generate`, `export`, `bench` and others. See `schema.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from distllm.config.data_schema import STRICT, NonNegativeFloat, NonNegativeInt, PositiveInt


@dataclass(frozen=True, config=STRICT)
class Generate:
    """`distllm generate`: continue `prompt` from the newest checkpoint of `run.dir`.

    prompt: text to continue.
    max_tokens: length of the completion, unless a document ends before.
    temperature: 0 takes the likeliest token.
    top_k: sample among the k likeliest; 0 means among all.
    """

    prompt: str
    max_tokens: PositiveInt
    temperature: NonNegativeFloat
    top_k: NonNegativeInt


@dataclass(frozen=True, config=STRICT)
class Select:
    """`distllm checkpoint ACTION`: which checkpoints of `run.dir` to use.

    step: `show` and `verify` read the checkpoint of this step; None means the newest, and all.
    against: `show` compares with this one, a step of the same run or the folder of a checkpoint.
    dry_run: `prune` only reports what it would remove.
    """

    step: NonNegativeInt | None
    against: Annotated[str, Field(strict=False, coerce_numbers_to_str=True)] | None
    dry_run: bool


@dataclass(frozen=True, config=STRICT)
class Bench:
    """`distllm bench ACTION`: measure a part of this job on this machine.

    steps: training steps that are measured. warmup_steps: before them, not measured.
    repeats: how often each save, load, reading of data and way to recompute is measured.
    folder: for scratch files, which are removed; None means the system's folder for them.
    json: file to write the results to.
    """

    steps: PositiveInt
    warmup_steps: NonNegativeInt
    repeats: PositiveInt
    folder: str | None
    json: str | None


@dataclass(frozen=True, config=STRICT)
class Export:
    """`distllm export`: write the newest checkpoint of `run.dir` as a Hugging Face folder.

    path: the folder to make.
    dtype: of the weights; `bf16` rounds the fp32 weights of the checkpoint.
    max_shard_bytes: largest file of weights; a tensor larger than this is alone in a file.
    """

    path: str | None
    dtype: Literal["fp32", "bf16"]
    max_shard_bytes: PositiveInt


@dataclass(frozen=True, config=STRICT)
class Import:
    """`distllm import`: start a run from the weights of a Hugging Face folder.

    path: that folder.
    """

    path: str | None
