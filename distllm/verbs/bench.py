"""`distllm bench ACTION`: measure a part of a job on this machine, by the module of that name in `bench/`."""

from __future__ import annotations

import importlib
from pathlib import Path

from distllm.bench.report import to_json
from distllm.config.compose import Request
from distllm.config.schema import Config
from distllm.runtime import dist
from distllm.verbs.check import vocabulary_size

# Its ranks compose the configuration themselves, as those of `train` do: that is a part of what is measured.
COMPOSES_ITSELF = ("startup",)


def run(config: Config, request: Request) -> int:
    """Every module has `run(config, vocab_size) -> Report`; rank 0 prints it and writes `bench.json`."""
    assert request.action, "a verb with actions has one"
    module = importlib.import_module(f"distllm.bench.{request.action}")
    arguments = {}
    if request.action in COMPOSES_ITSELF:
        arguments["overrides"] = (*request.config_flags, *request.overrides)
    report = module.run(config, vocabulary_size(config.tokenizer), **arguments)
    if dist.is_main():
        print(report.table, flush=True)
        if config.bench.json:
            file = Path(config.bench.json)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(to_json(request.action, config, report) + "\n")
    return 0
