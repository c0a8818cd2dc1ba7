"""`distllm generate`: continue a prompt from the newest checkpoint of a run."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

from torch import nn

from distllm.checkpoint.manifest import Manifest, read_manifest
from distllm.checkpoint.store import read_tensors
from distllm.config.compose import Request
from distllm.config.schema import Config, Model, Tokenizer
from distllm.data.tokenizer import TextTokenizer
from distllm.engine.pipeline import all_logits
from distllm.layout.fragment import Fragment
from distllm.layout.grid import Grid
from distllm.layout.groups import create_groups, destroy_groups
from distllm.layout.place import Place
from distllm.model.build import build_model
from distllm.runtime import dist
from distllm.trainer.completion import sample_tokens
from distllm.verbs.saved import SINGLE, checkpoint_to_read, refuse_launcher, tokenizer_folder


def run(config: Config, request: Request) -> int:
    """Load the weights into one process, whatever layout wrote them, and print prompt and continuation."""
    refuse_launcher("generate")
    path = checkpoint_to_read(config)
    manifest = read_manifest(path)
    config = _as_trained(config, manifest)
    tokenizer = TextTokenizer.load(tokenizer_folder(path, manifest), config.tokenizer.end_of_document)
    runtime = dist.start(timedelta(seconds=config.fault.hang_seconds))
    groups = create_groups(Grid(), runtime.timeout)
    try:
        vocab_size = manifest.details["tokenizer"]["vocab_size"]
        built = build_model(config, vocab_size, groups, runtime.device, draws=False)
        read_tensors(path, _weight_fragments(built.places))
        tokens = sample_tokens(
            lambda window: all_logits(built.chunks, window, groups, vocab_size),
            tokenizer.encode(config.generate.prompt) or [tokenizer.end_of_document],
            max_tokens=config.generate.max_tokens,
            seq_length=config.model.seq_length,
            end_of_document=tokenizer.end_of_document,
            temperature=config.generate.temperature,
            top_k=config.generate.top_k,
            seed=config.train.seed,
            device=runtime.device,
        )
    finally:
        destroy_groups()
        dist.stop(runtime, succeeded=True)
    print(config.generate.prompt + tokenizer.decode(tokens))
    return 0


def _as_trained(config: Config, manifest: Manifest) -> Config:
    """The given config with the checkpoint's model, in fp32, in one piece."""
    trained: dict[str, Any] = manifest.details["config"]
    return dataclasses.replace(
        config,
        model=Model(**trained["model"]),
        tokenizer=Tokenizer(**trained["tokenizer"]),
        parallel=SINGLE,
        train=dataclasses.replace(config.train, precision="fp32"),
    )


def _weight_fragments(places: dict[nn.Parameter, Place]) -> list[Fragment]:
    return [
        Fragment(place, 0, parameter.numel(), {"weight": parameter.detach().view(-1)}, writer=False)
        for parameter, place in places.items()
    ]
