"""All rules that combine several settings; one small function per rule.

Layouts: `layout_rules.py`; data: `data_rules.py`; the rules of each verb: `verbs.py`.

`check` is pure, `check_environment` looks at the files of this machine, `check_versions` at its packages.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from distllm.config import data_rules
from distllm.config.layout_rules import LAYOUT_RULES, Rule
from distllm.config.problems import Problem
from distllm.config.profile import profiled_steps
from distllm.config.registry import FAMILIES
from distllm.config.schema import Config

OLDEST_TORCH = (2, 11)
SUPPORTED_TORCH = "torch>=2.11,<2.14"
TESTED_VERSIONS = {"deepspeed": "0.19.8", "megatron-core": "0.16.1"}
NUM_BYTES = 256


class UnknownSetting(Exception):  # noqa: N818  # it ends a rule, it is no error
    """A rule has read a setting without a valid value, which is reported separately."""


class Known(SimpleNamespace):
    """Stands for a config of which only some settings are valid."""

    def __getattr__(self, name: str) -> Any:
        raise UnknownSetting(name)


def check(config: Config, world_size: int, rules: Sequence[Rule] | None = None) -> list[Problem]:
    """Return the problems of a job's settings taken together. rules: of a verb; None: of training."""
    return _collect(JOB_RULES if rules is None else rules, config, world_size)


def check_environment(config: Config, rules: Sequence[Rule]) -> list[Problem]:
    """Return what the job needs and this machine lacks. rules: the environment rules of a verb."""
    return _collect(rules, config, 1)


def check_model(config: Config) -> list[Problem]:
    """Return the problems among the settings of the model, for a model from a file."""
    return _collect(MODEL_RULES, config, 1)


def check_versions() -> list[Problem]:
    """Return installed packages that are too old or untested; read from their metadata without imports.

    The adapters use internals of DeepSpeed and Megatron Core: another version may train a wrong model without
    any error, so only tested versions are accepted.
    """
    problems = []
    installed = _installed("torch")
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if not numbers or (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        rule = f"must be at least {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"
        problems.append(Problem("torch", installed, rule, f"pip install '{SUPPORTED_TORCH}'"))
    for package, tested in TESTED_VERSIONS.items():
        if (installed := _installed(package)) != tested:
            rule = f"must be {tested}, the version that the adapter around it was tested with"
            problems.append(Problem(package, installed, rule, f"pip install '{package}=={tested}'"))
    return problems


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _collect(rules: Sequence[Rule], config: Config, world_size: int) -> list[Problem]:
    problems: list[Problem] = []
    for rule in rules:
        try:
            problems += rule(config, world_size)
        except UnknownSetting:
            continue
    return problems


def _model_family(config: Config, _: int) -> Iterator[Problem]:
    """Apply each rule of the model's family."""
    for rule in FAMILIES[config.model.family].rules:
        with suppress(UnknownSetting):
            yield from rule(config.model)


def _schedule_decay(config: Config, _: int) -> Iterator[Problem]:
    schedule, steps = config.schedule, config.train.steps
    if schedule.decay_steps is None:
        return
    if schedule.kind == "constant":
        rule = "must be null: schedule.kind=constant does not decay"
        yield Problem("schedule.decay_steps", schedule.decay_steps, rule, "schedule.decay_steps=null")
    elif schedule.kind == "wsd" and schedule.warmup_steps + schedule.decay_steps > steps:
        rule = f"must leave room for schedule.warmup_steps={schedule.warmup_steps} in train.steps={steps}"
        longest = steps - schedule.warmup_steps
        fix = f"schedule.decay_steps={longest}" if longest > 0 else "make schedule.warmup_steps smaller"
        yield Problem("schedule.decay_steps", schedule.decay_steps, rule, f"{fix}, or more train.steps")


def _schedule_minimum(config: Config, _: int) -> Iterator[Problem]:
    low, peak = config.schedule.min_lr, config.optimizer.lr
    if config.schedule.kind == "constant" and low:
        rule = "must be 0: schedule.kind=constant stays at optimizer.lr"
        yield Problem("schedule.min_lr", low, rule, "schedule.min_lr=0")
    elif low > peak:
        rule = f"must not be above optimizer.lr={peak}"
        yield Problem(
            "schedule.min_lr", low, rule, f"schedule.min_lr={peak / 10:g}, or a larger optimizer.lr"
        )


def _validation(config: Config, _: int) -> Iterator[Problem]:
    interval = config.train.validation_interval
    if interval and config.data.validation_fraction == 0:
        rule = "must be 0 when data.validation_fraction=0 holds out no documents"
        fix = "train.validation_interval=0, or data.validation_fraction=0.02"
        yield Problem("train.validation_interval", interval, rule, fix)


def _bucket_size(config: Config, _: int) -> Iterator[Problem]:
    size = config.zero.bucket_size
    if config.zero.stage > 0 and size % 2:
        rule = "must be even: DeepSpeed starts every message at a multiple of two elements"
        yield Problem("zero.bucket_size", size, rule, f"zero.bucket_size={size + 1}")


def _kept_checkpoints(config: Config, _: int) -> Iterator[Problem]:
    interval, every = config.checkpoint.interval, config.checkpoint.keep_every
    if every and (interval == 0 or every % interval):
        rule = f"must be a multiple of checkpoint.interval={interval}, or no such checkpoint is ever written"
        fix = f"checkpoint.keep_every={max(every // interval, 1) * interval if interval else 0}"
        yield Problem("checkpoint.keep_every", every, rule, fix)


def _gradient_accumulation(config: Config, _: int) -> Iterator[Problem]:
    kind, precision = config.train.gradient_accumulation, config.train.precision
    if kind == "bf16" and precision != "bf16":
        rule = f"must be fp32 for train.precision={precision}, whose gradients it would round"
        fix = "train.gradient_accumulation=fp32, or train.precision=bf16"
        yield Problem("train.gradient_accumulation", kind, rule, fix)


def _profile(config: Config, _: int) -> Iterator[Problem]:
    text, steps = config.train.profile, config.train.steps
    fix = f"train.profile={max(1, min(3, steps - 1))}:{max(1, min(3, steps - 1)) + 2}, or train.profile=null"
    try:
        window = profiled_steps(text)
    except ValueError:
        rule = "must be START:STOP, two integers with 0 < START < STOP: steps START to STOP - 1"
        yield Problem("train.profile", text, rule, fix)
        return
    if window and window.start > steps:
        yield Problem("train.profile", text, f"must begin at or before train.steps={steps}", fix)


def _tokenizer_path(config: Config, _: int) -> Iterator[Problem]:
    kind, path = config.tokenizer.kind, config.tokenizer.path
    if kind == "huggingface" and not path:
        yield Problem(
            "tokenizer.path", path, "is required for tokenizer.kind=huggingface", "tokenizer.path=FOLDER"
        )
    elif kind == "bytes" and path is not None:
        rule = "must be null for tokenizer.kind=bytes, which reads no file"
        yield Problem("tokenizer.path", path, rule, "tokenizer.path=null, or tokenizer=huggingface")


def _vocabulary(config: Config, _: int) -> Iterator[Problem]:
    tokenizer = config.tokenizer
    size, smallest = tokenizer.vocab_size, NUM_BYTES + 1 + len(tokenizer.special_tokens)
    parts = f"{NUM_BYTES} bytes, the end of a document and {len(tokenizer.special_tokens)} special tokens"
    if tokenizer.kind == "bytes" and size not in (None, smallest):
        rule = f"must be null or {smallest}: {parts}"
        yield Problem("tokenizer.vocab_size", size, rule, "tokenizer.vocab_size=null")
    elif tokenizer.kind == "huggingface" and size is not None:
        rule = "must be null for tokenizer.kind=huggingface, whose files define it"
        yield Problem("tokenizer.vocab_size", size, rule, "tokenizer.vocab_size=null")
    elif tokenizer.kind == "bpe" and tokenizer.path is None and (size is None or size < smallest):
        rule = f"must be at least {smallest} to train a BPE: {parts}"
        yield Problem(
            "tokenizer.vocab_size", size, rule, "tokenizer.vocab_size=8192, or tokenizer.path=FOLDER"
        )


def _special_tokens(config: Config, _: int) -> Iterator[Problem]:
    tokens, end = config.tokenizer.special_tokens, config.tokenizer.end_of_document
    if not end:
        fix = "tokenizer.end_of_document='<|endoftext|>'"
        yield Problem("tokenizer.end_of_document", end, "must not be empty", fix)
    if len(set(tokens)) < len(tokens) or end in tokens or "" in tokens:
        rule = f"must be distinct, not empty, and without the end of a document {end}"
        unique = [token for token in dict.fromkeys(tokens) if token and token != end]
        yield Problem("tokenizer.special_tokens", tokens, rule, f"tokenizer.special_tokens={unique}")


def tokenizer_found(config: Config, _: int) -> Iterator[Problem]:
    path = config.tokenizer.path
    if path and config.tokenizer.kind != "bytes" and not os.path.exists(os.path.expanduser(path)):
        rule = "must be a folder with a tokenizer.json"
        yield Problem("tokenizer.path", path, rule, "make one with `distllm tokenizer`, or correct the path")


def checkpoint_found(config: Config, _: int) -> Iterator[Problem]:
    resume = config.checkpoint.resume
    if resume not in ("auto", "never") and not os.path.isdir(os.path.expanduser(resume)):
        rule = "must be auto, never or the folder of a checkpoint"
        yield Problem("checkpoint.resume", resume, rule, "checkpoint.resume=auto")


def run_directory(config: Config, _: int) -> Iterator[Problem]:
    if reason := _why_not_writable(os.path.abspath(os.path.expanduser(config.run.dir))):
        yield Problem("run.dir", config.run.dir, f"must be writable; {reason}", "run.dir=FOLDER")


def _why_not_writable(path: str) -> str | None:
    """Return why no folder can be made or written at `path`, by its existing parents; None if it can."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        return f"{path} is not a folder"
    return None if os.access(path, os.W_OK | os.X_OK) else f"{path} cannot be written to"


def run_found(config: Config, _: int) -> Iterator[Problem]:
    if not os.path.isdir(config.run.dir):
        rule = f"must be the folder of a run; there is none, seen from {os.getcwd()}"
        yield Problem("run.dir", config.run.dir, rule, "run.dir=FOLDER")


def wandb_installed(config: Config, _: int) -> Iterator[Problem]:
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        fix = "pip install 'distllm[wandb]', or logging.wandb=false"
        yield Problem("logging.wandb", True, "needs the package wandb, which is not installed", fix)


def export_path(config: Config, _: int) -> Iterator[Problem]:
    if not config.export.path:
        yield Problem("export.path", config.export.path, "is required", "export.path=FOLDER, a new folder")


def export_folder(config: Config, _: int) -> Iterator[Problem]:
    if not config.export.path:
        return  # reported by export_path
    path = os.path.abspath(os.path.expanduser(config.export.path))
    if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
        rule = "must be a new or an empty folder: nothing is overwritten"
        yield Problem("export.path", config.export.path, rule, "name another folder, or empty this one")
    elif reason := _why_not_writable(path):
        yield Problem("export.path", config.export.path, f"must be writable; {reason}", "export.path=FOLDER")


def bench_folder(config: Config, _: int) -> Iterator[Problem]:
    folder, file = config.bench.folder, config.bench.json
    if folder is not None and not os.path.isdir(folder):
        yield Problem("bench.folder", folder, "must be an existing folder", "bench.folder=null")
    if file is not None and os.path.isdir(file):
        yield Problem("bench.json", file, "must be a file, not a folder", "bench.json=FILE")
    elif file is not None and (reason := _why_not_writable(os.path.dirname(os.path.abspath(file)))):
        yield Problem("bench.json", file, f"must be writable; {reason}", "bench.json=FILE")


def import_path(config: Config, _: int) -> Iterator[Problem]:
    if not config.import_.path:
        fix = "import.path=FOLDER, a folder that Hugging Face's save_pretrained or `distllm export` wrote"
        yield Problem("import.path", config.import_.path, "is required", fix)


def import_folder(config: Config, _: int) -> Iterator[Problem]:
    path = config.import_.path
    if path and not os.path.isfile(os.path.join(os.path.expanduser(path), "config.json")):
        rule = "must be a folder with a config.json"
        fix = "name a folder that Hugging Face's save_pretrained or `distllm export` wrote"
        yield Problem("import.path", path, rule, fix)


MODEL_RULES: tuple[Rule, ...] = (_model_family,)
DATA_RULES: tuple[Rule, ...] = (
    data_rules.source_paths,
    data_rules.mixture,
    data_rules.mixture_changes,
    data_rules.megatron_tokenizer,
    _tokenizer_path,
    _vocabulary,
    _special_tokens,
)
JOB_RULES: tuple[Rule, ...] = (
    *LAYOUT_RULES,
    *MODEL_RULES,
    _schedule_decay,
    _schedule_minimum,
    _validation,
    _gradient_accumulation,
    _bucket_size,
    _kept_checkpoints,
    _profile,
    *DATA_RULES,
)
