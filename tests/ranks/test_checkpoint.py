"""Checkpoints across ranks: a resume is exact, any layout reads what any other wrote, and so does PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jobs
import pytest
import torch
import torch.distributed.checkpoint as dcp
from by_day import DAY_AND_NIGHT
from harness import run_ranks
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distllm.checkpoint.manifest import find_damage, read_manifest
from distllm.checkpoint.retention import checkpoint_path
from distllm.checkpoint.store import write_checkpoint
from distllm.config.problems import UserError
from distllm.config.schema import Config
from distllm.engine.engine import Engine, StepResult
from distllm.model.parameters import count_parameters
from distllm.trainer.resume import restore

# PyTorch on reading without a process group, which is what these tests want.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

OPTIMIZER_STATES = {"exp_avg", "exp_avg_sq"}
# Another seed than the job that wrote the checkpoint: what is not loaded shows.
OTHER_SEED = "train.seed=99"
# Whose flat buffers end off the width of vector instructions: without `before_save` the two copies of a tied
# embedding drift apart by one bit, at stage 3.
ODD_SHAPE = (
    "model.hidden_size=36",
    "model.num_attention_heads=2",
    "model.num_query_groups=1",
    "model.head_dim=18",
    "model.ffn_hidden_size=35",
)


def make_config(*overrides: str) -> Config:
    return jobs.make_config("train.micro_batch_size=4", *overrides)


def train(engine: Engine, config: Config, steps: range) -> list[StepResult]:
    return [
        engine.train_step(jobs.microbatches(step, config, engine.groups), config.optimizer.lr)
        for step in steps
    ]


def save(engine: Engine, path: Path, step: int) -> None:
    engine.before_save()
    write_checkpoint(path, engine.fragments(), step=step, scalars=engine.scalars(), details={})


def load(path: Path, *overrides: str, vocab_size: int = jobs.VOCAB_SIZE) -> tuple[Engine, Config]:
    config = make_config(*overrides, OTHER_SEED)
    engine = jobs.build_engine(config, vocab_size)
    restore(engine, path)
    return engine, config


def local_state(engine: Engine) -> dict[str, Tensor]:
    """Everything that this rank holds, a copy: its fragments of weights and optimizer states."""
    return {
        f"{state}/{fragment.place.name}[{fragment.start}:{fragment.stop}]": tensor.clone()
        for fragment in engine.fragments()
        for state, tensor in fragment.tensors.items()
    }


def plain_read(path: Path) -> dict[str, Tensor]:
    """All global tensors, by PyTorch alone; NaN where the checkpoint has nothing."""
    tensors: dict[str, Tensor] = {}
    for module in (path / "tensors").iterdir():
        found = {}
        for name, stored in dcp.FileSystemReader(module).read_metadata().state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata), name
            found[name] = torch.full(tuple(stored.size), torch.nan, dtype=stored.properties.dtype)
        dcp.load(found, storage_reader=dcp.FileSystemReader(module), no_dist=True)
        tensors |= found
    return tensors


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of what is missing, superfluous, or not the same to the last bit."""
    odd = found.keys() ^ expected.keys()
    return sorted(odd) + [n for n in found if n not in odd and not torch.equal(found[n], expected[n])]


def resume_and_compare(rank: int, folder: Path, cases: list[tuple[str, ...]]) -> list[list[str]]:
    """For each case what differs between going on and going on from a checkpoint."""
    found = []
    tokens = torch.arange(32)[None]
    for number, case in enumerate(cases):
        path = checkpoint_path(folder / str(number), 3)
        config = make_config(*case)
        engine = jobs.build_engine(config)
        train(engine, config, range(3))
        save(engine, path, 3)
        saved, logits = local_state(engine), engine.logits(tokens, jobs.VOCAB_SIZE)
        expected = train(engine, config, range(3, 6))
        final, scalars = local_state(engine), engine.scalars()
        jobs.finish(engine)

        engine, config = load(path, *case)
        wrong = [f"loaded {name}" for name in differences(local_state(engine), saved)]
        if not torch.equal(engine.logits(tokens, jobs.VOCAB_SIZE), logits):
            wrong.append("working weights")
        results = train(engine, config, range(3, 6))
        if results != expected:
            wrong.append(f"{results} instead of {expected}")
        wrong += [f"final {name}" for name in differences(local_state(engine), final)]
        if engine.scalars() != scalars:
            wrong.append(f"{engine.scalars()} instead of {scalars}")
        jobs.finish(engine)
        found.append(wrong)
    return found


@pytest.mark.parametrize("part", DAY_AND_NIGHT)
def test_a_resume_under_the_same_layout_is_bitwise(part: int, tmp_path: Path) -> None:
    """Losses, gradient norms, weights and optimizer states, on both ranks, at every stage and precision."""
    cases = [
        (f"zero.stage={stage}", f"train.precision={precision}")
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
        if (stage + (precision == "bf16")) % 2 == part
    ]
    cases.append(("zero.stage=3", "zero.persistence_threshold=1000"))  # small parameters stay whole
    results = run_ranks(2, resume_and_compare, tmp_path, cases, deadline_seconds=240)
    for rank, wrong_per_case in enumerate(results):
        for case, wrong in zip(cases, wrong_per_case, strict=True):
            assert wrong == [], f"rank {rank}, {' '.join(case)}"


@pytest.mark.long
@pytest.mark.parametrize("part", DAY_AND_NIGHT)
def test_a_resume_under_model_parallelism_is_bitwise(part: int, tmp_path: Path) -> None:
    """The same on four ranks that share layers and their stack."""
    layouts = (
        ("parallel.tensor=2", "parallel.pipeline=2"),
        ("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
        ("parallel.tensor=2", "parallel.sequence=true", "model.tie_embeddings=true"),
        ("parallel.pipeline=2", "model.tie_embeddings=true", *ODD_SHAPE),
    )
    cases = [
        (f"zero.stage={stage}", *layout)
        for stage in (0, 1, 2, 3)
        for number, layout in enumerate(layouts)
        if (stage + number) % 2 == part
    ]
    results = run_ranks(4, resume_and_compare, tmp_path, cases, deadline_seconds=300)
    for rank, wrong_per_case in enumerate(results):
        for case, wrong in zip(cases, wrong_per_case, strict=True):
            assert wrong == [], f"rank {rank}, {' '.join(case)}"


def write_all(rank: int, folder: Path, cases: list[tuple[str, ...]]) -> list[list[StepResult]]:
    """Train three steps, save as folder/<number of the case>, train two more and return these."""
    further = []
    for number, case in enumerate(cases):
        config = make_config(*case)
        engine = jobs.build_engine(config)
        train(engine, config, range(3))
        save(engine, folder / str(number), 3)
        further.append(train(engine, config, range(3, 5)))
        jobs.finish(engine)
    return further


def reload_all(
    rank: int, pairs: list[tuple[Path, Path, tuple[str, ...]]]
) -> list[tuple[dict[str, Tensor], list[StepResult]]]:
    """Load each first path, save at once as the second, train two steps more."""
    results = []
    for source, copy, overrides in pairs:
        engine, config = load(source, *overrides)
        save(engine, copy, 3)
        results.append((jobs.gather_weights(engine), train(engine, config, range(3, 5))))
        jobs.finish(engine)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


STAGES = [(f"zero.stage={stage}",) for stage in (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[int, list[list[StepResult]]]:
    """By world size and ZeRO stage: the two steps after the checkpoint in folder/<world size>/<stage>."""
    return {size: run_ranks(size, write_all, folder / str(size), STAGES)[0] for size in (1, 2)}


# Each stage is read once and written once in either direction.
@pytest.mark.parametrize(
    ("writers", "readers", "pairs"),
    [(2, 1, [(3, 0), (0, 3), (1, 2), (2, 1)]), (1, 2, [(0, 3), (1, 0), (2, 3), (3, 1), (0, 2)])],
)
def test_any_layout_reads_what_any_other_wrote(
    writers: int,
    readers: int,
    pairs: list[tuple[int, int]],
    folder: Path,
    written: dict[int, list[list[StepResult]]],
) -> None:
    """Through another stage and number of ranks every bit of weights and optimizer states stays. The next
    steps add up gradients in another order: 1e-5 relative, as in test_zero_equality.py."""
    moves = [
        (folder / str(writers) / str(a), folder / f"{writers}-{readers}-{a}-{b}", STAGES[b]) for a, b in pairs
    ]
    results = run_ranks(readers, reload_all, moves)
    for rank_results in results:
        for (a, b), (source, copy, _), (weights, steps) in zip(pairs, moves, rank_results, strict=True):
            original = plain_read(source)
            assert differences(plain_read(copy), original) == [], f"stage {a} to {b}"
            stored = {n.removeprefix("weight/"): t for n, t in original.items() if n.startswith("weight/")}
            assert differences(weights, stored) == [], f"stage {a} to {b}"
            expected = written[writers][a]
            assert [s.loss for s in steps] == pytest.approx([s.loss for s in expected], rel=1e-5), (a, b)
            assert [s.grad_norm for s in steps] == pytest.approx([s.grad_norm for s in expected], rel=1e-5), (
                f"stage {a} to {b}"
            )


def test_precision_may_change(
    folder: Path, written: dict[int, list[list[StepResult]]], tmp_path: Path
) -> None:
    """A job in bf16 goes on from one in fp32: not a bit of the fp32 weights and states is lost on the way,
    and its next losses are those of bf16 (3e-3: eight bits of mantissa over a few layers)."""
    stages = [(0, 3), (1, 1), (3, 2), (2, 0)]
    moves = [
        (folder / "2" / str(a), tmp_path / f"{a}{b}", (f"zero.stage={b}", "train.precision=bf16"))
        for a, b in stages
    ]
    for results in run_ranks(2, reload_all, moves):
        for (a, b), (source, copy, _), (_, steps) in zip(stages, moves, results, strict=True):
            assert differences(plain_read(copy), plain_read(source)) == [], f"stage {a} to {b}"
            expected = [step.loss for step in written[2][a]]
            assert [step.loss for step in steps] == pytest.approx(expected, rel=3e-3), f"stage {a} to {b}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_element_is_in_the_file_exactly_once(
    stage: int, folder: Path, written: dict[int, list[list[StepResult]]]
) -> None:
    """No hole, and no replica writes what another has written."""
    modules = (folder / "2" / str(stage) / "tensors").iterdir()
    numel: dict[str, int] = {}
    for name, stored in [
        item
        for module in modules
        for item in dcp.FileSystemReader(module).read_metadata().state_dict_metadata.items()
    ]:
        assert isinstance(stored, TensorStorageMetadata), name
        times = torch.zeros(tuple(stored.size), dtype=torch.int32)
        for chunk in stored.chunks:
            times[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
        assert torch.equal(times, torch.ones_like(times)), name
        state = name.partition("/")[0]
        numel[state] = numel.get(state, 0) + sum(chunk.sizes.numel() for chunk in stored.chunks)
    model = make_config().model
    parameters = count_parameters(model, model.padded_vocab_size(jobs.VOCAB_SIZE)).total
    assert numel == dict.fromkeys({"weight", *OPTIMIZER_STATES}, parameters)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_both_ranks_share_the_writing(
    stage: int, folder: Path, written: dict[int, list[list[StepResult]]]
) -> None:
    """At every stage, also where both hold everything: neither writes more than two thirds."""
    path = folder / "2" / str(stage)
    assert find_damage(path) is None
    sizes = [record.bytes for name, record in read_manifest(path).files.items() if name.endswith(".distcp")]
    assert len(sizes) == 2
    assert max(sizes) < 2 / 3 * sum(sizes)


PLAIN_PYTORCH = """
import pathlib, sys, torch
import torch.distributed.checkpoint as dcp

tensors = {}
for module in pathlib.Path(sys.argv[1], "tensors").iterdir():
    reader = dcp.FileSystemReader(module)
    part = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(part, storage_reader=reader, no_dist=True)
    tensors |= part
assert not any(name.startswith(("distllm", "megatron", "deepspeed")) for name in sys.modules)
torch.save(tensors, sys.argv[2])
"""


def test_plain_pytorch_reads_a_checkpoint(
    folder: Path, written: dict[int, list[list[StepResult]]], tmp_path: Path
) -> None:
    """A fresh process without our package and without a process group gets all tensors, as we load them."""
    path = folder / "2" / "3"
    command = [sys.executable, "-c", PLAIN_PYTORCH, str(path), str(tmp_path / "tensors.pt")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    tensors = torch.load(tmp_path / "tensors.pt")
    ((ours, _),) = run_ranks(1, reload_all, [(path, tmp_path / "copy", STAGES[0])])[0]
    assert differences({f"weight/{name}": tensor for name, tensor in ours.items()}, tensors) == sorted(
        f"{state}/{name}" for state in OPTIMIZER_STATES for name in ours
    )


def refusals(rank: int, path: Path, cases: list[tuple[int, tuple[str, ...]]]) -> list[str]:
    messages = []
    for vocab_size, overrides in cases:
        engine = jobs.build_engine(make_config(*overrides), vocab_size)
        before = jobs.gather_weights(engine)
        with pytest.raises(UserError) as caught:
            restore(engine, path)
        messages.append(str(caught.value))
        assert differences(jobs.gather_weights(engine), before) == []
        jobs.finish(engine)
    return messages


def test_a_checkpoint_of_another_model_is_refused_on_every_rank(
    folder: Path, written: dict[int, list[list[StepResult]]]
) -> None:
    """With parameter and both shapes, before anything is overwritten, and on all ranks alike: under ZeRO
    some ranks hold nothing of the parameter that differs, and would go on alone."""
    embedding = "embedding.word_embeddings.weight is (384, 64) there and (512, 64) here"
    narrower = "embedding.word_embeddings.weight is (384, 64) there and (384, 32) here"
    added = "decoder.layers.4.input_layernorm.weight is not in the checkpoint"
    expected = {
        (500, ("zero.stage=1", "model.tie_embeddings=true")): embedding,
        (500, ("zero.stage=3",)): embedding,
        (300, ("zero.stage=2", "model.hidden_size=32")): narrower,
        (300, ("zero.stage=0", "model.num_layers=5")): added,
    }
    for messages in run_ranks(2, refusals, folder / "2" / "1", list(expected)):
        for case, message in zip(expected, messages, strict=True):
            assert expected[case] in message, case
            assert "checkpoint=" in message


def save_twice(rank: int, folder: Path) -> None:
    config = make_config("zero.stage=2")
    engine = jobs.build_engine(config)
    for step in (1, 2):
        train(engine, config, range(step - 1, step))
        save(engine, checkpoint_path(folder, step), step)
    jobs.finish(engine)


def test_remains_of_earlier_saves_do_not_hinder(tmp_path: Path) -> None:
    """A save that was killed half-way, a folder without manifest and a damaged checkpoint, all of the step
    that is now saved: they are replaced, and no file of theirs is left."""
    killed = checkpoint_path(tmp_path, 1).with_name("step_00000001.tmp")
    unfinished = checkpoint_path(tmp_path, 1)
    damaged = checkpoint_path(tmp_path, 2)
    for remains in (killed, unfinished, damaged):
        remains.mkdir()
        (remains / "__9_0.distcp").write_bytes(b"remains")
    (damaged / "manifest.json").write_text("{")
    run_ranks(2, save_twice, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
    for step in (1, 2):
        path = checkpoint_path(tmp_path, step)
        assert find_damage(path) is None
        manifest = read_manifest(path)
        assert manifest.step == step
        files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        assert files == {*manifest.files, "manifest.json"}
