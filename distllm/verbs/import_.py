"""`distllm import`: a Hugging Face folder as the checkpoint of step 0 from which a run starts."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distllm import __version__
from distllm.checkpoint.retention import checkpoint_path, list_checkpoints
from distllm.checkpoint.store import write_checkpoint
from distllm.config.compose import Request, assignment, to_plain
from distllm.config.problems import UserError, user_error
from distllm.config.rules import check_model
from distllm.config.schema import Config, Tokenizer
from distllm.data.tokenizer import TextTokenizer
from distllm.huggingface.config import dropouts, from_their_config
from distllm.huggingface.counterpart import Counterpart, counterparts
from distllm.huggingface.read import Stored, find_tensors, match_tensors, read_json
from distllm.layout.grid import Grid
from distllm.layout.save_groups import SaveGroups
from distllm.metrics.format import count
from distllm.metrics.run_directory import RunDirectory, utc_now
from distllm.metrics.run_lock import RunLock
from distllm.model.parameters import count_parameters
from distllm.runtime import dist
from distllm.trainer.checkpointing import LIBRARIES, TOKENIZER_FOLDER, tokenizer_files
from distllm.verbs.export import TOKENIZER_CONFIG, token_text
from distllm.verbs.saved import refuse_launcher

NO_STRINGS = ("null", "true", "false", "nan", "inf")  # words that Hydra takes for something else


def run(config: Config, request: Request) -> int:
    """Write the checkpoint of step 0 into `run.dir` and print how to train on from it."""
    refuse_launcher("import")
    assert config.import_.path is not None, "the rules ask for import.path"
    folder = Path(config.import_.path).expanduser().absolute()
    run_directory = RunDirectory(Path(config.run.dir), create=False)
    _refuse_used(run_directory)
    theirs = read_json(folder, "config.json")
    model = from_their_config(theirs, name=folder.name, vocab_multiple=config.model.vocab_multiple)
    tokenizer = _load_tokenizer(folder, theirs, config.tokenizer.end_of_document)
    config = dataclasses.replace(
        config,
        model=model,
        tokenizer=Tokenizer(
            kind="huggingface",
            vocab_size=None,
            path=str(folder),
            special_tokens=[],
            end_of_document=tokenizer.end_of_document_text,
        ),
    )
    if problems := check_model(config):
        raise UserError(problems)
    tensors = counterparts(model, tokenizer.vocab_size)
    stored = match_tensors(folder, find_tensors(folder), tensors)
    RunDirectory(run_directory.path)  # made and found writable
    path = checkpoint_path(run_directory.checkpoints_path, 0)
    lock = RunLock(run_directory.path)
    try:
        _refuse_used(run_directory)  # once more: another job may have been quicker
        _write(config, path, tensors, stored, tokenizer.vocab_size)
    finally:
        lock.release()
    _say_how_to_go_on(config, path, theirs, tokenizer.vocab_size)
    return 0


def _refuse_used(run_directory: RunDirectory) -> None:
    traces = [run_directory.metrics_path, run_directory.status_path]
    traces += list_checkpoints(run_directory.checkpoints_path)
    if used := [path for path in traces if path.exists()]:
        rule = f"must be the folder of a new run; there is {used[0]}"
        raise user_error("run.dir", run_directory.path, rule, "run.dir=FOLDER, a new folder")


def _load_tokenizer(folder: Path, theirs: Mapping[str, Any], end_of_document: str) -> TextTokenizer:
    """end_of_document: taken where the folder does not say which token ends a text."""
    end = None
    if (folder / TOKENIZER_CONFIG).is_file():
        end = token_text(read_json(folder, TOKENIZER_CONFIG).get("eos_token"))
    tokenizer = TextTokenizer.load(folder, end or end_of_document)
    if tokenizer.vocab_size != theirs.get("vocab_size"):
        rule = f"must be the size of the tokenizer beside it, {tokenizer.vocab_size}, largest id + 1"
        fix = f"model.resize_token_embeddings({tokenizer.vocab_size}) in transformers, then save_pretrained"
        raise user_error("config.json: vocab_size", theirs.get("vocab_size"), rule, fix)
    return tokenizer


def _write(
    config: Config, path: Path, tensors: Sequence[Counterpart], stored: Mapping[str, Stored], vocab_size: int
) -> None:
    """Write the checkpoint; the whole model is in files that stand for memory, not in memory."""
    assert config.tokenizer.path is not None, "the tokenizer is the folder's"
    runtime = dist.start(timedelta(seconds=config.fault.hang_seconds))
    succeeded = False
    try:
        with tempfile.TemporaryDirectory(prefix="import-", dir=config.run.dir) as scratch:
            fragments = []
            for number, counterpart in enumerate(tensors):
                theirs = {name: stored[name].load() for name in counterpart.their_names}
                weight = _on_disk(counterpart.import_tensors(theirs), Path(scratch, str(number)))
                fragments.append(counterpart.fragment(weight))
            write_checkpoint(
                path,
                fragments,
                step=0,
                scalars={},
                details=_details(config, vocab_size),
                attachments=tokenizer_files(Path(config.tokenizer.path)),
                groups=SaveGroups(runtime.everyone, runtime.everyone),
            )
        succeeded = True
    finally:
        dist.stop(runtime, succeeded)


def _on_disk(tensor: Tensor, file: Path) -> Tensor:
    """A copy whose pages the system can take back, since it has them in `file`."""
    mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.copy_(tensor.view(-1))


def _details(config: Config, vocab_size: int) -> dict[str, Any]:
    """As the trainer writes them; there is no data yet that the run would have to go on with."""
    return {
        "reason": "import",
        "time": utc_now(),
        "config": to_plain(config),
        "layout": Grid().described,
        "data": None,
        "tokenizer": {"folder": TOKENIZER_FOLDER, "vocab_size": vocab_size},
        "versions": {"distllm": __version__} | {name: version(name) for name in LIBRARIES},
    }


def _say_how_to_go_on(config: Config, path: Path, theirs: Mapping[str, Any], vocab_size: int) -> None:
    parameters = count(count_parameters(config.model, vocab_size).total)
    print(f"{path}: the weights of {config.tokenizer.path}, {parameters} parameters")
    if left_out := dropouts(theirs):
        print(f"its {', '.join(left_out)} is not taken over: distllm trains without dropout")
    print("train on from it with your own data and settings added to:")
    print(f"distllm train {' '.join(map(_quoted, overrides(config)))}")


def overrides(config: Config) -> list[str]:
    """The settings by which `distllm train` goes on from an imported checkpoint."""
    model = {f"model.{name}": value for name, value in to_plain(config)["model"].items()}
    tokenizer = {
        "tokenizer": "huggingface",
        "tokenizer.path": config.tokenizer.path,
        "tokenizer.end_of_document": config.tokenizer.end_of_document,
    }
    return [
        _override(name, value) for name, value in {"run.dir": config.run.dir, **tokenizer, **model}.items()
    ]


def _override(name: str, value: object) -> str:
    if not isinstance(value, str):
        return f"{name}={json.dumps(value)}"
    is_plain = re.fullmatch(r"[A-Za-z/][A-Za-z0-9_./-]*", value) and value.lower() not in NO_STRINGS
    return f"{name}={value}" if is_plain else assignment(name, value)


def _quoted(text: str) -> str:
    """For the shell."""
    return f'"{text}"' if "'" in text and not re.search(r'[$`"\\!]', text) else shlex.quote(text)
