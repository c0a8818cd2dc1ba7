"""The table of verbs of the command `distllm VERB`. A new verb is one file, and one entry here.

A verb outside of distllm registers itself: `register(Verb("mine", ..., module="my_module"))`, in a module
that the environment variable DISTLLM_PLUGINS names (see `registry.py`).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from distllm.config import data_rules, rules
from distllm.config.layout_rules import Rule
from distllm.config.problems import user_error


@dataclass(frozen=True)
class Verb:
    """What the command line needs to know of a verb before its module is imported.

    help: its purpose, in a few words.
    module: has `run(config: Config, request: Request) -> int`, which executes it and returns the exit code.
    actions: values of its first argument, where it has several actions. None stands for no such argument.
        ANY_WORD lets the verb check the word.
    bare_arguments: arguments of one call that are not settings of the job; NAME=VALUE like an override.
    rules, environment_rules: those that its config must keep. Each verb checks the sections that it uses:
        `generate` and `export` take the model from a checkpoint.
    late_rules: further rules, `module:function`, for a config that keeps all others; what they import may be
        above `config`.
    no_sweep: why `-m` is not allowed; None where every job of a sweep is a call of the verb.
    usage: what may follow its name, for the help; ACTION stands for all actions.
    on_refusal: `module:function`, called with the `UserError` that rejects the config and the request;
        returns the config to use instead, or raises.
    former_names: names under which it can still be called.
    """

    name: str
    help: str
    module: str
    actions: tuple[str | None, ...] = (None,)
    bare_arguments: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    environment_rules: tuple[Rule, ...] = ()
    late_rules: tuple[str, ...] = ()
    no_sweep: str | None = None
    usage: tuple[str, ...] = ()
    on_refusal: str = "distllm.plan.replan:replanned"
    former_names: tuple[str, ...] = ()

    @property
    def usage_lines(self) -> list[str]:
        actions = "|".join(filter(None, self.actions))
        return [f"distllm {self.name} {line.replace('ACTION', actions)}" for line in self.usage]


ANY_WORD: tuple[str | None, ...] = ()
_FILES: tuple[Rule, ...] = (data_rules.data_found, rules.tokenizer_found)
_TABLE = (
    Verb(
        "train",
        "pretrain a model; the same command again resumes",
        "distllm.verbs.train",
        rules=rules.JOB_RULES,
        environment_rules=(
            *_FILES,
            rules.checkpoint_found,
            rules.run_directory,
            rules.wandb_installed,
        ),
        late_rules=("distllm.verbs.check:fits_the_device_when_started",),
    ),
    Verb(
        "check",
        "check whether a job is legal on world_size=N ranks, and what it needs",
        "distllm.verbs.check",
        bare_arguments=("world_size",),
        rules=rules.JOB_RULES,
        environment_rules=(rules.tokenizer_found,),  # reads only this, for the size of the vocabulary
        late_rules=("distllm.verbs.check:fits_the_device",),
        no_sweep="looks at one job at a time",
        on_refusal="distllm.verbs.check:refuse",
    ),
    Verb(
        "config",
        "explain every setting: meaning, allowed values, present value",
        "distllm.verbs.config",
        actions=ANY_WORD,
        no_sweep="looks at one job at a time",
        usage=("[GROUP|GROUP.SETTING] [overrides]",),
    ),
    Verb(
        "tokenizer",
        "train the tokenizer of a job",
        "distllm.verbs.tokenizer",
        rules=rules.DATA_RULES,
        environment_rules=_FILES,
    ),
    Verb(
        "data",
        "turn the documents of a job into token files; the same command again resumes",
        "distllm.verbs.data",
        actions=(None, "merge"),
        bare_arguments=("shard",),
        rules=rules.DATA_RULES,
        environment_rules=_FILES,
        usage=(
            "shard=I/N [overrides] for each I from 0 to N - 1, on any machines; then",
            "merge [overrides]",
        ),
    ),
    Verb(
        "lineage",
        "trace the data of a step; prove that each sequence came once",
        "distllm.verbs.lineage",
        bare_arguments=("step", "steps", "verify"),
        usage=("run.dir=DIR step=N|verify=true [overrides]",),
        former_names=("trace",),
    ),
    Verb("report", "account for a run's time", "distllm.verbs.report"),
    Verb(
        "generate",
        "continue a prompt from the newest checkpoint of a run",
        "distllm.verbs.generate",
    ),
    Verb(
        "export",
        "write a checkpoint as a Hugging Face folder",
        "distllm.verbs.export",
        rules=(rules.export_path,),
        environment_rules=(rules.checkpoint_found, rules.export_folder),
    ),
    Verb(
        "import",
        "start a run from the weights of a Hugging Face folder",
        "distllm.verbs.import_",
        rules=(rules.import_path,),
        environment_rules=(rules.import_folder, rules.run_directory),
    ),
    Verb(
        "checkpoint",
        "list, show, verify or prune the checkpoints of a run",
        "distllm.verbs.checkpoint",
        actions=("list", "show", "verify", "prune"),
        environment_rules=(rules.run_found,),
        no_sweep="looks at one run at a time",
        usage=("ACTION run.dir=DIR [overrides]",),
    ),
    Verb(
        "bench",
        "measure a part of a job on this machine",
        "distllm.verbs.bench",
        # Each is a module of distllm/bench.
        actions=("train", "layouts", "recompute", "checkpoint", "data", "startup"),
        bare_arguments=("world_size",),
        rules=rules.JOB_RULES,
        # Of its actions only `data` reads documents, and itself reports missing ones.
        environment_rules=(rules.tokenizer_found, rules.bench_folder),
        usage=("ACTION [overrides]", "startup world_size=N [overrides]"),
    ),
)
VERBS: dict[str, Verb] = {verb.name: verb for verb in _TABLE}


def register(verb: Verb) -> None:
    """Add a verb; one of the same name is replaced."""
    VERBS[verb.name] = verb


def find(name: str) -> Verb:
    """Return the verb with this name or former name; a `UserError` where there is none."""
    if name in VERBS:
        return VERBS[name]
    for verb in VERBS.values():
        if name in verb.former_names:
            return verb
    nearest = difflib.get_close_matches(name, VERBS, n=1)
    fix = f"distllm {nearest[0]}" if nearest else "distllm --help"
    raise user_error("verb", name, f"must be one of {', '.join(VERBS)}", fix)
