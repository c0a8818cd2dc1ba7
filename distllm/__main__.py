"""`distllm VERB [overrides]`, the same as `python -m distllm VERB [overrides]`, alone or under a launcher.

Nothing heavy is imported before a job's configuration is known to be sound: help, `--cfg` and a mistake are
answered within a second, without torch.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from distllm import __version__
from distllm.config import verbs
from distllm.config.problems import EXIT_USER_ERROR, UserError
from distllm.config.registry import imported, load_plugins
from distllm.runtime import light_imports, quiet
from distllm.runtime.ending import EXIT_INTERRUPTED, end_if_groups_are_left

HELP = """distllm {version}: distributed LLM pretraining.

  distllm VERB [overrides]       or  python -m distllm VERB [overrides]
  torchrun --nproc-per-node N -m distllm VERB [overrides]
{usage}

Verbs:
{verbs}

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
        code = _run(_without_local_rank(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        code = _report(error)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BaseException as error:
        end_if_groups_are_left(error)
        raise
    end_if_groups_are_left(code)
    return code


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"distllm {__version__}")
        return 0
    # Both before a plugin or the verb's module imports torch and what builds on it.
    quiet.silence()
    light_imports.install()
    load_plugins()
    if not arguments or arguments[0] in ("--help", "-h"):
        print(_help(), end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else EXIT_USER_ERROR

    name, *rest = arguments
    verb = verbs.find(name)
    if name != verb.name and _is_first_rank():
        print(f"distllm {name} is now called distllm {verb.name}", file=sys.stderr, flush=True)

    from distllm.config import compose, sweep

    request = compose.parse(verb.name, rest)
    if request.only_shows:
        compose.show(request, f"distllm {verb.name}: {verb.help}")
        return 0
    if request.is_sweep:
        return sweep.run(request)
    try:
        config = compose.load(request)
    except UserError as error:
        config = imported(verb.on_refusal)(error, request)
    return int(imported(f"{verb.module}:run")(config, request))


def _help() -> str:
    usage = [f"  {line}" for verb in verbs.VERBS.values() for line in verb.usage_lines]
    width = max(map(len, verbs.VERBS)) + 2
    descriptions = [f"  {verb.name:<{width}}{verb.help}" for verb in verbs.VERBS.values()]
    return HELP.format(version=__version__, usage="\n".join(usage), verbs="\n".join(descriptions))


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
    if _is_first_rank():
        print(f"distllm: {error}", file=sys.stderr, flush=True)
    else:
        # A launcher ends all ranks once one has failed: a rank that left first could silence rank 0.
        time.sleep(5)
    return EXIT_USER_ERROR


def _is_first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


if __name__ == "__main__":
    sys.exit(main())
