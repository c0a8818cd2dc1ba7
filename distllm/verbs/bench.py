"""`distllm bench ACTION`: measure a part of a job on this machine, by the module of that name in `bench/`."""

from __future__ import annotations

import importlib
from pathlib import Path

from distllm.bench.report import Report, to_json
from distllm.config.compose import Request
from distllm.config.problems import user_error
from distllm.config.schema import Config
from distllm.runtime import dist
from distllm.verbs.check import vocabulary_size

# Its ranks compose the configuration themselves, as those of `train` do: that is a part of what is measured.
COMPOSES_ITSELF = ("startup",)


def run(config: Config, request: Request) -> int:
    """Every module has `run(config, vocab_size) -> Report`; rank 0 prints it and writes `bench.json`."""
    assert request.action, "a verb with actions has one"
    module = importlib.import_module(f"distllm.bench.{request.action}")
    vocab_size = vocabulary_size(config.tokenizer)
    if "world_size" in request.arguments:
        report = _played(config, request, vocab_size)
    elif request.action in COMPOSES_ITSELF:
        report = module.run(config, vocab_size, overrides=(*request.config_flags, *request.overrides))
    else:
        report = module.run(config, vocab_size)
    if dist.is_main():
        print(report.table, flush=True)
        if config.bench.json:
            file = Path(config.bench.json)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(to_json(request.action, config, report) + "\n")
    return 0


def _played(config: Config, request: Request, vocab_size: int) -> Report:
    """Play ranks of a job as large as `world_size` says, which only `startup` can."""
    if request.action != "startup":
        rule = "only `distllm bench startup` plays ranks that are not there"
        fix = f"start the ranks: torchrun --nproc-per-node N -m distllm bench {request.action} ..."
        raise user_error("world_size", request.world_size, rule, fix)
    from distllm.bench.fake_world import run

    return run(config, vocab_size, request.world_size)
