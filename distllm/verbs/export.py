"""`distllm export`: a checkpoint as a Hugging Face folder: weights, configuration and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from distllm.checkpoint.manifest import read_manifest
from distllm.checkpoint.store import read_tensors
from distllm.config.compose import Request
from distllm.config.problems import user_error
from distllm.config.schema import Config, Model
from distllm.data.tokenizer import TextTokenizer
from distllm.huggingface.config import to_their_config
from distllm.huggingface.counterpart import Counterpart, counterparts
from distllm.huggingface.write import write_json, write_weights
from distllm.metrics.format import count
from distllm.model.parameters import count_parameters
from distllm.verbs.saved import checkpoint_to_read, refuse_launcher, tokenizer_folder

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


def run(config: Config, request: Request) -> int:
    """Write `export.path`, which exists only once it is whole. Needs no GPU and no process group."""
    refuse_launcher("export")
    path = checkpoint_to_read(config)
    manifest = read_manifest(path)
    model = Model(**manifest.details["config"]["model"])
    vocab_size = manifest.details["tokenizer"]["vocab_size"]
    tensors = counterparts(model, vocab_size)
    tokenizer_source = tokenizer_folder(path, manifest)
    end_of_document = manifest.details["config"]["tokenizer"]["end_of_document"]
    tokenizer = TextTokenizer.load(tokenizer_source, end_of_document)

    def read(counterpart: Counterpart) -> Tensor:
        weight = torch.empty(counterpart.global_shape)
        read_tensors(path, [counterpart.fragment(weight)])
        return weight

    assert config.export.path is not None, "the rules ask for export.path"
    target = Path(config.export.path).expanduser().absolute()
    with _whole_or_not_at_all(target) as folder:
        their_config = to_their_config(
            model, vocab_size=vocab_size, end_of_document=tokenizer.end_of_document, dtype=config.export.dtype
        )
        write_json(folder / "config.json", their_config)
        ends = {key: their_config[key] for key in ("bos_token_id", "eos_token_id")}
        write_json(folder / "generation_config.json", ends)
        copy_tokenizer(tokenizer_source, folder, end_of_document)
        write_weights(folder, tensors, read, config.export.dtype, config.export.max_shard_bytes)
    parameters = count(count_parameters(model, vocab_size).total)
    print(f"{target}: {their_config['architectures'][0]}, {parameters} parameters in {config.export.dtype}")
    print(f"from {path}, step {manifest.step:,}")
    return 0


def copy_tokenizer(source: Path, target: Path, end_of_document: str) -> None:
    """The tokenizer byte by byte, with the token that the model has learnt to end a text with."""
    shutil.copyfile(source / TOKENIZER, target / TOKENIZER)
    stored = None
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if (source / TOKENIZER_CONFIG).is_file():
        stored = json.loads((source / TOKENIZER_CONFIG).read_text())
        config = dict(stored)
    # Without it, transformers 4 gives token types, too, which its Llama does not take.
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if token_text(config.get("eos_token")) != end_of_document:
        config["eos_token"] = end_of_document
    if config == stored:
        shutil.copyfile(source / TOKENIZER_CONFIG, target / TOKENIZER_CONFIG)
    else:
        write_json(target / TOKENIZER_CONFIG, config)


def token_text(token: object) -> str | None:
    """The text of a special token of `tokenizer_config.json`, which is plain or in an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


@contextmanager
def _whole_or_not_at_all(target: Path) -> Iterator[Path]:
    """A folder to fill beside `target`, which takes its name in the end, or goes where anything fails."""
    temporary = target.with_name(target.name + ".tmp")
    if temporary.exists():
        rule = f"{temporary} is in the way: an export that goes on, or one that was killed"
        raise user_error("export.path", target, rule, "delete it, unless another export is writing it")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(target)  # over an empty folder at most, the system sees to that
    except BaseException:
        shutil.rmtree(temporary)
        raise
