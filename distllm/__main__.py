"""`distllm VERB [overrides]`, the same as `python -m distllm VERB [overrides]`, alone or under a launcher.

Nothing heavy is imported before a job's configuration is known to be sound: help, `--cfg` and a mistake are
answered within a second, without torch.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import time
from collections.abc import Sequence

from distllm import __version__
from distllm.config.problems import EXIT_USER_ERROR, UserError, user_error

# verb: (the module whose `run(config: Config) -> int` does it, what it does)
VERBS = {
    "train": ("distllm.verbs.train", "pretrain a model; the same command again resumes"),
    "check": ("distllm.verbs.check", "say whether a job is legal on world_size=N ranks, and what it needs"),
    "tokenizer": ("distllm.verbs.tokenizer", "train the tokenizer of a job"),
    "data": ("distllm.verbs.data", "turn the documents of a job into token files; again resumes"),
    "trace": ("distllm.verbs.lineage", "say what data went into a step; prove that each sequence came once"),
    "report": ("distllm.verbs.report", "say what became of a run's time"),
    "generate": ("distllm.verbs.generate", "continue a prompt from the newest checkpoint of a run"),
    "export": ("distllm.verbs.export", "write a checkpoint as a Hugging Face folder"),
    "import": ("distllm.verbs.import_", "start a run from the weights of a Hugging Face folder"),
    "checkpoint": ("distllm.verbs.checkpoint", "list, show, verify or prune the checkpoints of a run"),
    "bench": ("distllm.verbs.bench", "measure a part of a job on this machine"),
}
# Their `run` takes the request: it says more than its config, or has an answer where the config is refused.
RUN_ON_REQUEST = ("check", "checkpoint")
# Their `run` takes the config and the request, whose action and arguments it needs.
RUN_WITH_REQUEST = ("data", "trace", "bench")
EXIT_INTERRUPTED = 130

HELP = f"""distllm {__version__}: distributed LLM pretraining.

  distllm VERB [overrides]       or  python -m distllm VERB [overrides]
  torchrun --nproc-per-node N -m distllm VERB [overrides]
  distllm checkpoint list|show|verify|prune run.dir=DIR [overrides]
  distllm bench train|layouts|recompute|checkpoint|data|startup [overrides]
  distllm data shard=I/N [overrides] for each I from 0 to N - 1, on any machines; then
  distllm data merge [overrides]

Verbs:
{chr(10).join(f"  {verb:<12}{text}" for verb, (_, text) in VERBS.items())}

Overrides are Hydra's: model=tiny takes another configuration of a group, train.steps=100 sets a value,
+experiment=quickstart takes a complete named run.
  distllm VERB --help            groups and settings
  distllm VERB --cfg job         the configuration that a command makes, without running it
  distllm VERB -m train.seed=1,2 one run after another, for every combination of the values
  distllm --version
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    try:
        return _run(_without_local_rank(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        return _report(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(HELP, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else EXIT_USER_ERROR
    if arguments[0] == "--version":
        print(f"distllm {__version__}")
        return 0

    verb, *rest = arguments
    if verb not in VERBS:
        nearest = difflib.get_close_matches(verb, VERBS, n=1)
        fix = f"distllm {nearest[0]}" if nearest else "distllm --help"
        raise user_error("verb", verb, f"must be one of {', '.join(VERBS)}", fix)

    from distllm.config import compose, sweep
    from distllm.runtime import quiet

    module, description = VERBS[verb]
    request = compose.parse(verb, rest)
    if request.only_shows:
        compose.show(request, f"distllm {verb}: {description}")
        return 0
    if verb in RUN_ON_REQUEST:
        return int(importlib.import_module(module).run(request))
    if request.is_sweep:
        return sweep.run(request)
    try:
        config = compose.load(request)
    except UserError as error:
        from distllm.plan.replan import replanned

        config = replanned(error, request.world_size, verb)
    quiet.silence()  # before the verb's module imports torch and what builds on it
    run = importlib.import_module(module).run
    return int(run(config, request) if verb in RUN_WITH_REQUEST else run(config))


def _without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Move the `--local_rank=N` that the `deepspeed` launcher adds to the environment, as torchrun does."""
    kept: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, _, value = argument.partition("=")
        if name in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", value or next(remaining, "0"))
        else:
            kept.append(argument)
    return kept


def _report(error: UserError) -> int:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"distllm: {error}", file=sys.stderr, flush=True)
    else:
        # A launcher ends all ranks once one has failed: a rank that left first could silence rank 0.
        time.sleep(5)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
