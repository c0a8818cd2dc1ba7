"""`distllm export` and `distllm import` as commands, judged by the library transformers.

Each case is a small job, trained for a few steps, then exported, imported and exported again.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from by_day import every_second
from commands import Finished, fork, start
from harness import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from distllm.config import compose
from distllm.data.order import Order, sequence_numbers
from distllm.data.token_stream import TokenStream
from distllm.verbs.export import copy_tokenizer
from distllm.verbs.import_ import _quoted, overrides

BYTES = ("tokenizer=bytes",)
GPT2 = (
    "model.normalization=layernorm",
    "model.position_embedding=learned",
    "model.activation=gelu_tanh",
    "model.bias=true",
    "model.num_query_groups=4",
)
CASES = {
    "llama": (*BYTES, "model.num_query_groups=2", "model.head_dim=24"),
    "llama-tied": (*BYTES, "model.tie_embeddings=true", "model.rope_base=500"),
    "llama-bias": (*BYTES, "model.bias=true", "model.num_query_groups=1"),
    "llama-tp-zero3": (*BYTES, "parallel.tensor=2", "zero.stage=3", "model.num_query_groups=2"),
    "gpt2": (*BYTES, *GPT2, "model.tie_embeddings=true"),
    "gpt2-gelu": (
        *GPT2,
        "model.tie_embeddings=false",
        "model.activation=gelu",
        "tokenizer=bpe",
        "tokenizer.vocab_size=300",
    ),
    "gpt2-pp-tied": (
        *BYTES,
        *GPT2,
        "model.tie_embeddings=true",
        "parallel.pipeline=2",
        "train.precision=bf16",
    ),
}
RANKS = {"llama-tp-zero3": 4, "gpt2-pp-tied": 2}
TRAINING = [
    "data=text",
    "data.path=corpus/*.txt",
    "data.cache=cache",
    "data.validation_fraction=0",
    "train.steps=5",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.validation_interval=0",
    "optimizer.lr=0.01",
    "schedule=constant",
    "schedule.warmup_steps=0",
    "checkpoint.interval=5",
    "logging.sample_tokens=0",
]
PROMPTS, MAX_TOKENS = ("def ", "import if", "cl", "pass return "), 12


class Workplace:
    """A folder with a corpus, where commands are run; a run of each case and its export are made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: set[str] = set()
        (folder / "corpus").mkdir(parents=True)
        words = ["def", "return", "if", "else", "for", "while", "import", "from", "class", "pass"]
        generator = random.Random(0)
        for number in range(30):
            text = " ".join(generator.choices(words, k=150)) + "\n"
            (folder / "corpus" / f"{number:02}.txt").write_text(text)

    def run(self, *arguments: str) -> Finished:
        return fork(self.folder, *arguments)

    def succeed(self, *arguments: str) -> Finished:
        result = self.run(*arguments)
        assert result.exit_code == 0, result.output
        return result

    def trained(self, case: str) -> str:
        """The run of a case: a few steps at a rate that makes every weight differ from its start."""
        if case not in self.done:
            arguments = ["train", *TRAINING, "model=tiny", *CASES[case], f"run.dir={case}"]
            if case in RANKS:
                result = start(self.folder, *arguments, num_ranks=RANKS[case])
                assert result.exit_code == 0, result.output
            else:
                self.succeed(*arguments)
            self.done.add(case)
        return case

    def exported(self, case: str, *overrides: str, name: str = "hf") -> Path:
        folder = self.folder / name / case
        if not folder.exists():
            run = self.trained(case)
            self.succeed("export", f"run.dir={run}", f"export.path={name}/{case}", *overrides)
        return folder


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("export"))


def checkpoint_of(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def some_tokens() -> Tensor:
    return torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(3))


def our_logits(rank: int, checkpoint: Path) -> Tensor:
    """[4, 32, vocab] of the model that trains, built from a checkpoint by the way of `generate`."""
    from distllm.checkpoint.manifest import read_manifest
    from distllm.checkpoint.store import read_tensors
    from distllm.engine.pipeline import all_logits
    from distllm.layout.grid import Grid
    from distllm.layout.groups import create_groups, destroy_groups
    from distllm.model.build import build_model
    from distllm.verbs.generate import _as_trained, _weight_fragments

    manifest = read_manifest(checkpoint)
    config = _as_trained(compose.load(compose.parse("generate", [])), manifest)
    groups = create_groups(Grid(), timedelta(seconds=60))
    vocab_size = manifest.details["tokenizer"]["vocab_size"]
    built = build_model(config, vocab_size, groups, torch.device("cpu"))
    read_tensors(checkpoint, _weight_fragments(built.places))
    with torch.no_grad():
        logits = all_logits(built.chunks, some_tokens(), groups, vocab_size)
    destroy_groups()
    return logits


# ---------------------------------------------------------------- export


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_logits_that_we_compute(case: str, workplace: Workplace) -> None:
    folder = workplace.exported(case)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(theirs) is (GPT2LMHeadModel if "gpt2" in case else LlamaForCausalLM)
    with torch.no_grad():
        logits = theirs(some_tokens()).logits
    ours = run_ranks(1, our_logits, checkpoint_of(workplace.folder / case))[0]
    assert logits.shape == ours.shape
    assert ours.std() > 0.1
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", every_second(["llama", "llama-tied", "gpt2", "gpt2-gelu"]))
def test_transformers_writes_the_text_that_we_write(case: str, workplace: Workplace) -> None:
    assert_same_text(workplace, case, workplace.exported(case))


def assert_same_text(workplace: Workplace, run: str, folder: Path) -> dict[str, str]:
    """Ours beside that of transformers: its tokenizer, its greedy choice and its cache of keys and values,
    all from the exported folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert (model.generation_config.eos_token_id, tokenizer.eos_token_id) == (end, end)
    texts = {}
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**tokens, max_new_tokens=MAX_TOKENS, do_sample=False, use_cache=True)
        texts[prompt] = str(tokenizer.decode(ids[0], skip_special_tokens=True))
        settings = [f"generate.prompt='{prompt}'", f"generate.max_tokens={MAX_TOKENS}"]
        ours = workplace.succeed("generate", f"run.dir={run}", *settings, "generate.temperature=0")
        assert ours.stdout == texts[prompt] + "\n"
    assert any(len(text) > len(prompt) for prompt, text in texts.items()), "all end at once: nothing is shown"
    return texts


def test_bf16_weights_are_the_rounded_ones(workplace: Workplace) -> None:
    exact = weights_of(workplace.exported("llama"))
    folder = workplace.exported("llama", "export.dtype=bf16", name="hf-bf16")
    rounded = weights_of(folder)
    assert rounded.keys() == exact.keys()
    for name, tensor in exact.items():
        assert torch.equal(rounded[name], tensor.to(torch.bfloat16)), name
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


def test_files_of_a_bounded_size_are_the_same_model(workplace: Workplace) -> None:
    whole = weights_of(workplace.exported("llama"))
    folder = workplace.exported("llama", "export.max_shard_bytes=100_000", name="hf-parts")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert not (folder / "model.safetensors").exists()
    header = 10_000
    assert all(file.stat().st_size < 100_000 + header for file in files)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = model.state_dict()
    assert loaded.keys() == whole.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    numel = sum(tensor.numel() for tensor in whole.values())
    assert index["metadata"] == {"total_parameters": numel, "total_size": 4 * numel}


def test_a_named_checkpoint_is_exported_and_not_the_newest(workplace: Workplace) -> None:
    settings = [*TRAINING, "model=tiny", *CASES["llama"], "run.dir=two"]
    workplace.succeed("train", *settings, "checkpoint.interval=2", "train.steps=4")
    first = f"checkpoint.resume={workplace.folder}/two/checkpoints/step_00000002"
    named = workplace.succeed("export", "run.dir=two", "export.path=named", first)
    newest = workplace.succeed("export", "run.dir=two", "export.path=newest")
    assert "step_00000002, step 2" in named.stdout
    assert "step_00000004, step 4" in newest.stdout
    weights = [weights_of(workplace.folder / name) for name in ("named", "newest")]
    assert not any(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


STOP = {"content": "<|endoftext|>", "special": True}
COMPLETE = {"eos_token": "<|endoftext|>", "model_input_names": ["input_ids"]}


@pytest.mark.parametrize(
    ("stored", "written"),
    [
        (COMPLETE, None),
        (COMPLETE | {"eos_token": STOP}, None),
        (COMPLETE | {"eos_token": "</s>", "x": 1}, COMPLETE | {"x": 1}),
        (
            {"x": 1},
            {"x": 1, "eos_token": "<|endoftext|>", "model_input_names": ["input_ids", "attention_mask"]},
        ),
    ],
)
def test_the_tokenizer_is_copied_and_ends_texts_as_the_model_does(
    stored: dict[str, Any], written: dict[str, Any] | None, tmp_path: Path
) -> None:
    """written: None means the same bytes."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "tokenizer.json").write_text("{ }")
    (source / "tokenizer_config.json").write_text(json.dumps(stored))
    copy_tokenizer(source, target, "<|endoftext|>")
    assert (target / "tokenizer.json").read_text() == "{ }"
    copied = (target / "tokenizer_config.json").read_text()
    assert copied == json.dumps(stored) if written is None else json.loads(copied) == written


# ---------------------------------------------------------------- import


@pytest.mark.parametrize(
    ("case", "overrides", "name"),
    [
        *((case, [], "hf") for case in CASES),
        ("llama", ["export.dtype=bf16"], "hf-bf16"),
        ("gpt2", ["export.max_shard_bytes=60_000"], "hf-parts"),
    ],
)
def test_import_and_export_give_the_same_bytes(
    case: str, overrides: list[str], name: str, workplace: Workplace
) -> None:
    first = workplace.exported(case, *overrides, name=name)
    run, second = f"again-{name}-{case}", f"second-{name}-{case}"
    workplace.succeed("import", f"import.path={name}/{case}", f"run.dir={run}")
    workplace.succeed("export", f"run.dir={run}", f"export.path={second}", *overrides)
    assert contents(workplace.folder / second) == contents(first)


def foreign_model(folder: Path, family: str, tokenizer: Path) -> Any:
    """A random model of transformers, written by transformers, beside a tokenizer of ours."""
    torch.manual_seed(5)
    common = {"vocab_size": 257, "initializer_range": 0.1, "bos_token_id": 256, "eos_token_id": 256}
    if family == "llama":
        sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6}
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 24}
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **common, rms_norm_eps=1e-4))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=3, n_head=4, n_positions=24, **common))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.eval().save_pretrained(folder, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("zero", "precision", "family"),
    every_second(
        [
            (0, "fp32", "llama"),
            (0, "fp32", "gpt2"),
            (1, "bf16", "gpt2"),
            (1, "bf16", "llama"),
            (3, "fp32", "llama"),
            (3, "fp32", "gpt2"),
        ]
    ),
)
def test_training_starts_from_a_model_of_transformers(
    family: str, zero: int, precision: str, workplace: Workplace
) -> None:
    name = f"foreign-{family}-{zero}"
    model = foreign_model(workplace.folder / name, family, workplace.exported("llama"))
    imported = workplace.succeed("import", f"import.path={name}", f"run.dir=run-{name}")
    workplace.succeed("export", f"run.dir=run-{name}", f"export.path=again-{name}")
    theirs, ours = (weights_of(workplace.folder / folder) for folder in (name, f"again-{name}"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)
    texts = assert_same_text(workplace, f"run-{name}", workplace.folder / f"again-{name}")
    assert len(set("".join(texts.values()))) > 20, "a random model hardly repeats itself"

    command = shlex.split(imported.stdout.splitlines()[-1])
    assert command[:2] == ["distllm", "train"]
    workplace.succeed("train", *command[2:], *TRAINING, f"zero.stage={zero}", f"train.precision={precision}")
    loss = first_loss(workplace.folder / f"run-{name}")
    expected = their_loss(model, first_batch(workplace.folder, seq_length=24))
    assert loss == pytest.approx(expected, rel=1e-5 if precision == "fp32" else 2e-3)
    assert ("is not taken over" in imported.stdout) == (family == "gpt2")


@pytest.mark.parametrize("name", ["null", "1e3", "it's a $HOME", 'a,b=[c] "d"', "-x", "back\\slash", "café"])
def test_what_is_printed_to_go_on_can_be_copied(name: str) -> None:
    """Through a shell and Hydra, whatever the folder is called."""
    config = compose.load(compose.parse("data", ["model=tiny", "tokenizer=bytes", "data.source=stdlib"]))
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=f"runs/{name}"),
        model=dataclasses.replace(config.model, name=name, head_dim=24, norm_epsilon=3e-7),
        tokenizer=dataclasses.replace(config.tokenizer, kind="huggingface", path=f"/models/{name}"),
    )
    command = f"printf '%s\\0' {' '.join(map(_quoted, overrides(config)))}"
    arguments = subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout.decode()
    again = compose.load(compose.parse("generate", arguments.removesuffix("\0").split("\0")))
    assert (again.run, again.model, again.tokenizer) == (config.run, config.model, config.tokenizer)


def first_loss(run: Path) -> float:
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert row["step"] == 1
    return float(row["loss"])


def first_batch(folder: Path, seq_length: int) -> Tensor:
    """[8, seq_length + 1]: the sequences of step 1, read from the newest token file."""
    newest = max((folder / "cache").glob("data-*"), key=lambda path: path.stat().st_mtime)
    stream = TokenStream(newest / "train")
    num_sequences, order = (stream.num_tokens - 1) // seq_length, Order(1234, "text")
    numbers = sequence_numbers(np.zeros(8, np.int64), np.arange(8), num_sequences, order).tolist()
    windows = [stream.read(i * seq_length, (i + 1) * seq_length + 1) for i in numbers]
    return torch.from_numpy(np.stack(windows).astype(np.int64))


def their_loss(model: Any, tokens: Tensor) -> float:
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


# ---------------------------------------------------------------- refusals


def assert_refused(result: Finished, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr


def test_export_refuses_what_it_cannot_do(workplace: Workplace) -> None:
    run = f"run.dir={workplace.trained('llama')}"
    (workplace.folder / "full").mkdir()
    (workplace.folder / "full" / "mine.txt").write_text("mine")
    (workplace.folder / "busy.tmp").mkdir()
    assert_refused(workplace.run("export", run), "export.path=null", "is required")
    assert_refused(workplace.run("export", run, "export.path=full"), "nothing is overwritten")
    assert_refused(workplace.run("export", run, "export.path=full/mine.txt"), "nothing is overwritten")
    assert_refused(workplace.run("export", run, "export.path=full/mine.txt/x"), "mine.txt is not a folder")
    assert_refused(workplace.run("export", run, "export.path=busy"), "busy.tmp is in the way")
    assert_refused(workplace.run("export", run, "export.path=x", "export.dtype=fp16"), "export.dtype=fp16")
    assert_refused(workplace.run("export", "run.dir=nothing", "export.path=x"), "must hold a checkpoint")
    resume = f"checkpoint.resume={workplace.folder}"
    assert_refused(workplace.run("export", run, "export.path=x", resume), "a complete checkpoint is needed")
    assert contents(workplace.folder / "full") == {"mine.txt": b"mine"}
    assert not (workplace.folder / "x").exists()
    (workplace.folder / "empty").mkdir()
    workplace.succeed("export", run, "export.path=empty")


def test_export_refuses_a_shape_that_transformers_has_not(workplace: Workplace) -> None:
    settings = [*TRAINING, "model=tiny", "tokenizer=bytes", "model.position_embedding=learned"]
    workplace.succeed("train", *settings, "run.dir=odd")
    result = workplace.run("export", "run.dir=odd", "export.path=odd-hf")
    assert_refused(result, "model.position_embedding=learned", "must be rope in Llama", "and GPT-2 (")
    assert not list(workplace.folder.glob("odd-hf*"))


def test_import_refuses_what_it_cannot_do(workplace: Workplace) -> None:
    good = workplace.exported("llama")
    used = f"run.dir={workplace.trained('llama')}"
    assert_refused(workplace.run("import", "run.dir=new"), "import.path=null", "is required")
    both = workplace.run("import", "run.dir=new", "train.step=1")
    assert_refused(both, "2 problems", "import.path=null", "did you mean train.steps?")
    assert_refused(workplace.run("import", "import.path=corpus", "run.dir=new"), "with a config.json")
    assert_refused(workplace.run("import", f"import.path={good}", used), "must be the folder of a new run")
    assert not (workplace.folder / "new").exists()


def spoil(folder: Path, good: Path, **changes: Any) -> str:
    """A copy of a good folder with other settings in its config.json."""
    folder.mkdir()
    for name, content in contents(good).items():
        (folder / name).write_bytes(content)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return f"import.path={folder}"


def test_import_refuses_a_model_that_is_not_ours(workplace: Workplace, tmp_path: Path) -> None:
    good = workplace.exported("llama")

    def refused(name: str, *parts: str, **changes: Any) -> None:
        path = spoil(tmp_path / name, good, **changes)
        assert_refused(workplace.run("import", path, "run.dir=new"), *parts)

    scaling = {"rope_type": "llama3", "factor": 8.0}
    refused("scaled", "rope_scaling", "plain rotary positions", rope_scaling=scaling, sliding_window=9)
    refused(
        "scaled-too", "config.json: sliding_window=9", "must be null", rope_scaling=scaling, sliding_window=9
    )
    refused("taller", "missing: model.layers.4.", "and 4 more", num_hidden_layers=5)
    refused("lower", "superfluous: model.layers.3.", num_hidden_layers=3)
    refused(
        "wider",
        "model.layers.0.mlp.gate_proj.weight is (176, 64) instead of (200, 64)",
        intermediate_size=200,
    )
    refused("words", "config.json: vocab_size=99", "the size of the tokenizer beside it, 257", vocab_size=99)
    refused("groups", "model.num_query_groups=3", "must divide", num_key_value_heads=3)
    path = spoil(tmp_path / "silent", good)
    (tmp_path / "silent" / "tokenizer.json").unlink()
    assert_refused(workplace.run("import", path, "run.dir=new"), "must hold a tokenizer.json")
    (tmp_path / "silent" / "config.json").write_text("{")
    assert_refused(workplace.run("import", path, "run.dir=new"), "must hold a readable config.json")
    assert not (workplace.folder / "new").exists()


@pytest.mark.parametrize("verb", every_second(["export", "import"]))
def test_a_launcher_is_refused(verb: str, workplace: Workplace) -> None:
    good = workplace.exported("llama")
    arguments = ["run.dir=new", f"import.path={good}", "export.path=x"]
    result = start(workplace.folder, verb, *arguments, num_ranks=2)
    assert result.exit_code != 0
    assert f"{verb} runs in one process" in result.stderr
