"""Our tensors and settings and Hugging Face's are the same model, by the library transformers itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jobs
import pytest
import reference
import torch
from harness import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from distllm.config import compose
from distllm.config.problems import UserError
from distllm.config.schema import Model
from distllm.huggingface.config import as_exported, dropouts, from_their_config, to_their_config
from distllm.huggingface.counterpart import Counterpart, counterparts, join_qkv, split_qkv
from distllm.huggingface.read import find_tensors, match_tensors
from distllm.huggingface.write import plan_files, write_json, write_weights
from distllm.layout.place import Shape

VOCAB_SIZE = 300  # padded to 384 rows
LLAMA = ("model=tiny", "model.num_layers=2")
GPT2 = (
    "model=gpt2_124m",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_attention_heads=4",
    "model.num_query_groups=4",
    "model.seq_length=32",
)
SHAPES = {
    "llama": LLAMA,
    "llama, tied": (*LLAMA, "model.tie_embeddings=true"),
    "llama, one key-value head": (*LLAMA, "model.num_query_groups=1"),
    "llama, a key-value head each": (*LLAMA, "model.num_query_groups=4"),
    "llama, wide heads": (*LLAMA, "model.head_dim=24"),
    "llama, biases": (*LLAMA, "model.bias=true"),
    "llama, another base and epsilon": (*LLAMA, "model.rope_base=77", "model.norm_epsilon=0.1"),
    "gpt2": GPT2,
    "gpt2, untied": (*GPT2, "model.tie_embeddings=false"),
    "gpt2, exact gelu, another epsilon": (*GPT2, "model.activation=gelu", "model.norm_epsilon=0.1"),
}
by_shape = pytest.mark.parametrize("shape", SHAPES)


def model_of(*overrides: str) -> Model:
    return compose.load(compose.parse("generate", overrides)).model


def tensors_of(model: Model, vocab_size: int = VOCAB_SIZE) -> list[Counterpart]:
    return counterparts(model, vocab_size)


def their_config(model: Model, vocab_size: int = VOCAB_SIZE) -> dict[str, Any]:
    return to_their_config(model, vocab_size=vocab_size, end_of_document=vocab_size - 1, dtype="fp32")


def their_model(model: Model, vocab_size: int = VOCAB_SIZE) -> Any:
    """As transformers builds it from the config that we write, at random weights."""
    config = json.loads(json.dumps(their_config(model, vocab_size)))
    if config["model_type"] == "llama":
        return LlamaForCausalLM(LlamaConfig.from_dict(config)).eval()
    return GPT2LMHeadModel(GPT2Config.from_dict(config)).eval()


def their_shapes(model: Model, vocab_size: int) -> dict[str, Shape]:
    with torch.device("meta"):
        theirs = their_model(model, vocab_size)
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    if model.tie_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def random_weights(tensors: list[Counterpart]) -> dict[str, Tensor]:
    """Canonical name -> values of which none is like another; far from 1 and 0 also in norms and biases."""
    generator = torch.Generator().manual_seed(1)
    return {t.name: torch.randn(t.global_shape, generator=generator) * 0.2 + 0.1 for t in tensors}


BASE = model_of(*LLAMA)


# ---------------------------------------------------------------- the same names, shapes and numbers


@pytest.mark.parametrize(
    ("name", "vocab_size"), [("llama3_8b", 128_256), ("gpt2_124m", 50_257), ("quickstart", 8192)]
)
def test_published_shapes_have_the_names_and_shapes_of_transformers(name: str, vocab_size: int) -> None:
    """On the meta device: the 8 billion parameters are only described."""
    model = model_of(f"model={name}")
    ours = {n: s for tensor in tensors_of(model, vocab_size) for n, s in tensor.their_shapes.items()}
    assert ours == their_shapes(model, vocab_size)


@by_shape
def test_every_shape_has_the_names_and_shapes_of_transformers(shape: str) -> None:
    model = model_of(*SHAPES[shape])
    ours = {n: s for tensor in tensors_of(model) for n, s in tensor.their_shapes.items()}
    assert ours == their_shapes(model, VOCAB_SIZE)


@by_shape
def test_exported_tensors_compute_the_same(shape: str) -> None:
    """Our side is the reference in plain PyTorch, their side transformers; both in float64 but for the angles
    of rotary positions, which transformers computes in fp32."""
    model = model_of(*SHAPES[shape])
    tensors = tensors_of(model)
    weights = {name: weight.double() for name, weight in random_weights(tensors).items()}
    theirs = their_model(model).double()
    exported = {n: part for t in tensors for n, part in t.export_tensors(weights[t.name]).items()}
    missing, unexpected = theirs.load_state_dict(exported, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if model.tie_embeddings else [], [])
    tokens = torch.randint(0, VOCAB_SIZE, (2, 32), generator=torch.Generator().manual_seed(2))
    ours = reference.logits(flat_gates(weights), tokens, jobs.reference_shape(model))
    with torch.no_grad():
        difference = (theirs(tokens).logits - ours).abs().max() / ours.abs().max()
    assert difference < 1e-6


def flat_gates(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gate and up projection stacked, as modules have them: [2, ffn, ...] -> [2 * ffn, ...]."""
    return {n: w.flatten(0, 1) if ".linear_fc1." in n and w.size(0) == 2 else w for n, w in weights.items()}


def built_places(rank: int, cases: list[tuple[str, ...]]) -> list[dict[str, Shape]]:
    built = []
    for overrides in cases:
        engine = jobs.build_engine(jobs.make_config(*overrides), VOCAB_SIZE)
        built.append({place.name: place.global_shape for place in engine.places.values()})
        jobs.finish(engine)
    return built


def test_our_names_and_shapes_are_those_of_the_model_that_trains() -> None:
    places = run_ranks(1, built_places, list(SHAPES.values()))[0]
    for shape, built in zip(SHAPES, places, strict=True):
        assert {t.name: t.global_shape for t in tensors_of(model_of(*SHAPES[shape]))} == built, shape


# ---------------------------------------------------------------- there and back


@by_shape
def test_import_is_the_inverse_of_export(shape: str) -> None:
    tensors = tensors_of(model_of(*SHAPES[shape]))
    for tensor, weight in zip(tensors, random_weights(tensors).values(), strict=True):
        if tensor.name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert weight.size(0) == 384
            weight[VOCAB_SIZE:] = 0  # padding is not exported, and comes back as 0
        parts = tensor.export_tensors(weight)
        assert {name: tuple(part.shape) for name, part in parts.items()} == tensor.their_shapes
        assert all(part.is_contiguous() for part in parts.values())
        assert torch.equal(tensor.import_tensors(parts).view(weight.shape), weight), tensor.name


@given(groups=st.integers(1, 4), per_group=st.integers(1, 4), width=st.integers(1, 5), bias=st.booleans())
def test_rows_of_queries_keys_and_values_go_where_they_belong(
    groups: int, per_group: int, width: int, bias: bool
) -> None:
    """Each row carries its own name: (which of the three, head, row in the head)."""
    heads = groups * per_group
    model = dataclasses.replace(BASE, num_attention_heads=heads, num_query_groups=groups, head_dim=width)
    ours = [
        (kind, head, row)
        for group in range(groups)
        for kind, head in [
            *((0, group * per_group + i) for i in range(per_group)),
            (1, group),
            (2, group),
        ]
        for row in range(width)
    ]
    rows = torch.tensor(ours)  # [rows, 3], like a weight with 3 columns
    if bias:
        rows = torch.tensor([kind * 10_000 + head * 100 + row for kind, head, row in ours])
    theirs = split_qkv(rows, model)
    ordered = sorted(ours)  # all queries, all keys, all values, each by head
    expected = torch.tensor(ordered)
    if bias:
        expected = torch.tensor([kind * 10_000 + head * 100 + row for kind, head, row in ordered])
    assert torch.equal(theirs, expected)
    assert torch.equal(join_qkv(theirs, model), rows)


@pytest.mark.parametrize("shape", [*SHAPES, "model=llama3_405b", "model=gpt2_124m"])
def test_a_model_comes_back_from_its_config(shape: str) -> None:
    model = model_of(*SHAPES.get(shape, (shape,)))
    again = from_their_config(
        json.loads(json.dumps(their_config(model))), name=model.name, vocab_multiple=model.vocab_multiple
    )
    # What a family has no use for is not in its config: GPT-2 has no base of rotary positions.
    assert again == as_exported(model) == model


# ---------------------------------------------------------------- files


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=30), limit=st.integers(1, 150))
def test_files_hold_everything_in_order_and_are_not_too_large(sizes: list[int], limit: int) -> None:
    named = {f"tensor{i}": size for i, size in enumerate(sizes)}
    plan = plan_files(named, limit)
    assert [name for names in plan.values() for name in names] == list(named)
    assert all(names for names in plan.values())
    totals = [sum(named[name] for name in names) for names in plan.values()]
    assert all(total <= limit or len(names) == 1 for total, names in zip(totals, plan.values(), strict=True))
    # None could be longer: the first tensor of the next would not have fitted.
    followers = [named[names[0]] for names in list(plan.values())[1:]]
    assert all(total + follower > limit for total, follower in zip(totals, followers, strict=False))
    count = len(plan)
    expected = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert list(plan) == (expected if count > 1 else ["model.safetensors"])


@pytest.mark.parametrize("max_bytes", [1, 50_000, 10**9])
def test_written_tensors_are_found_again(max_bytes: int, tmp_path: Path) -> None:
    tensors = tensors_of(model_of(*LLAMA))
    weights = random_weights(tensors)
    write_weights(tmp_path, tensors, lambda t: weights[t.name], "fp32", max_bytes)
    stored = match_tensors(tmp_path, find_tensors(tmp_path), tensors)
    for tensor in tensors:
        again = tensor.import_tensors({name: stored[name].load() for name in tensor.their_names})
        expected = weights[tensor.name].reshape(tensor.shape)
        if "embedding" in tensor.name or "output" in tensor.name:
            expected[VOCAB_SIZE:] = 0
        assert torch.equal(again, expected)
    num_files = len(list(tmp_path.glob("*.safetensors")))
    assert (num_files == 1) == (max_bytes == 10**9)
    assert (num_files == len(stored)) == (max_bytes == 1)


def write_model(
    folder: Path, change: Mapping[str, Tensor | None], prefix: str = "model."
) -> list[Counterpart]:
    """A folder with the tensors of LLAMA, some of them replaced or, where None, left out."""
    tensors = tensors_of(model_of(*LLAMA))
    theirs = {n: p for t in tensors for n, p in t.export_tensors(torch.ones(t.global_shape)).items()}
    changed: dict[str, Tensor | None] = {**theirs, **change}
    save_file(
        {
            prefix + name.removeprefix("model.") if name.startswith("model.") else name: tensor
            for name, tensor in changed.items()
            if tensor is not None
        },
        folder / "model.safetensors",
    )
    return tensors


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({Q: None}, f"missing: {Q}"),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(3)}, "superfluous: model.layers.2.mlp.up_proj"),
        ({"model.layers.1.self_attn.q_proj.bias": torch.ones(64)}, "superfluous: model.layers.1.self_attn.q"),
        ({Q: torch.ones(64, 32)}, rf"{Q} is \(64, 32\) instead of \(64, 64\)"),
        ({Q: torch.ones(64, 64, dtype=torch.int8)}, f"{Q} is I8"),
        ({Q: torch.ones(64, 64, dtype=torch.float64)}, f"{Q} is F64"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: dict[str, Tensor | None], complaint: str, tmp_path: Path
) -> None:
    tensors = write_model(tmp_path, change)
    with pytest.raises(UserError, match=complaint) as refusal:
        match_tensors(tmp_path, find_tensors(tmp_path), tensors)
    assert len(refusal.value.problems) == 1


def test_constants_of_earlier_versions_are_no_weights(tmp_path: Path) -> None:
    tensors = write_model(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    match_tensors(tmp_path, find_tensors(tmp_path), tensors)


def test_a_model_stored_without_its_head_has_shorter_names(tmp_path: Path) -> None:
    tensors = write_model(tmp_path, {}, prefix="")
    stored = match_tensors(tmp_path, find_tensors(tmp_path), tensors)
    assert stored[Q].name == Q.removeprefix("model.")


def test_a_file_that_is_not_there_or_cut_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must hold model\.safetensors or model\.safetensors\.index"):
        find_tensors(tmp_path)
    write_model(tmp_path, {})
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"must hold a whole model\.safetensors"):
            find_tensors(tmp_path)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {Q: "absent.safetensors"}})
    with pytest.raises(UserError, match=r"must hold a whole absent\.safetensors"):
        find_tensors(tmp_path)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        ((*LLAMA, "model.position_embedding=learned"), ["model.position_embedding=learned"]),
        ((*LLAMA, "model.normalization=layernorm"), ["model.normalization=layernorm"]),
        ((*LLAMA, "model.activation=gelu"), ["model.activation=gelu"]),
        (
            (*LLAMA, "model.num_attention_heads=6", "model.head_dim=16"),
            ["model.hidden_size=64"],
        ),
        ((*GPT2, "model.position_embedding=rope"), ["model.position_embedding=rope"]),
        ((*GPT2, "model.activation=swiglu"), ["model.activation=swiglu"]),
        ((*GPT2, "model.bias=false"), ["model.bias=false"]),
        ((*GPT2, "model.num_query_groups=2"), ["model.num_query_groups=2"]),
        ((*GPT2, "model.head_dim=32"), ["model.head_dim=32"]),
        ((*GPT2, "model.bias=false", "model.head_dim=32"), ["model.bias=false", "model.head_dim=32"]),
    ],
)
def test_shapes_that_transformers_has_not_are_refused(overrides: tuple[str, ...], refused: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        as_exported(model_of(*overrides))
    assert [str(problem).splitlines()[0] for problem in refusal.value.problems] == refused
    assert all("distllm exports Llama (" in problem.fix for problem in refusal.value.problems)


LLAMA_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mistral"}, "config.json: model_type=mistral"),
    ({"model_type": None}, "config.json: model_type=null"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "config.json: architectures="),
    ({"hidden_act": "gelu"}, "config.json: hidden_act=gelu"),
    ({"sliding_window": 4096}, "config.json: sliding_window=4096"),
    ({"partial_rotary_factor": 0.5}, "config.json: partial_rotary_factor=0.5"),
    ({"quantization_config": {"bits": 4}}, "config.json: quantization_config="),
    ({"attention_bias": True}, "config.json: attention_bias=true"),
    ({"mlp_bias": True}, "config.json: attention_bias=false"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "config.json: rope_scaling="),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "config.json: rope_scaling="),
    ({"rope_parameters": {"rope_type": "yarn"}}, "config.json: rope_parameters="),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "config.json: rope_parameters="),
    ({"rope_parameters": 7}, "config.json: rope_parameters=7"),
    ({"rope_theta": 5.0}, "config.json: rope_theta=[5.0, 10000.0]"),
    ({"hidden_size": None}, "config.json: hidden_size=null"),
    ({"hidden_size": "64"}, "config.json: hidden_size=64"),
    ({"num_attention_heads": 0}, "config.json: num_attention_heads=0"),
    ({"rope_theta": "high", "rope_parameters": None}, "config.json: rope_theta=high"),
    ({"num_hidden_layers": 0}, "config.json: num_hidden_layers=0"),
    ({"num_key_value_heads": 0}, "config.json: num_key_value_heads=0"),
    ({"attention_bias": 1, "mlp_bias": 1}, "config.json: attention_bias=1"),
]
GPT2_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"activation_function": "relu"}, "config.json: activation_function=relu"),
    ({"scale_attn_weights": False}, "config.json: scale_attn_weights=false"),
    ({"scale_attn_by_inverse_layer_idx": True}, "config.json: scale_attn_by_inverse_layer_idx=true"),
    ({"add_cross_attention": True}, "config.json: add_cross_attention=true"),
    ({"architectures": ["GPT2DoubleHeadsModel"]}, "config.json: architectures="),
    ({"n_head": None}, "config.json: n_head=null"),
]


@pytest.mark.parametrize(
    ("shape", "change", "refused"),
    [("llama", *case) for case in LLAMA_REFUSALS] + [("gpt2", *case) for case in GPT2_REFUSALS],
)
def test_what_our_model_is_not_is_refused_by_name(shape: str, change: dict[str, Any], refused: str) -> None:
    raw = their_config(model_of(*SHAPES[shape])) | change
    with pytest.raises(UserError) as refusal:
        from_their_config(raw, name="x", vocab_multiple=128)
    assert str(refusal.value.problems[0]).startswith(refused)


def test_all_that_is_wrong_is_said_at_once() -> None:
    raw = their_config(model_of(*LLAMA)) | {"sliding_window": 4, "hidden_act": "relu", "hidden_size": 0}
    with pytest.raises(UserError) as refusal:
        from_their_config(raw, name="x", vocab_multiple=128)
    assert [problem.setting.split()[1] for problem in refusal.value.problems] == [
        "hidden_act",
        "sliding_window",
        "hidden_size",
    ]


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_scaling", "rope_parameters", "nowhere"])
def test_the_base_of_rotary_positions_is_read_in_every_spelling(spelling: str) -> None:
    raw = their_config(model_of(*LLAMA))
    del raw["rope_theta"], raw["rope_parameters"]
    inner = {"rope_theta": 123.0, "rope_type": "default"}
    raw |= {"rope_theta": {"rope_theta": 123.0}, "nowhere": {}}.get(spelling, {spelling: inner})
    base = from_their_config(raw, name="x", vocab_multiple=128).rope_base
    theirs = LlamaConfig.from_dict(dict(raw)).rope_parameters["rope_theta"]
    assert base == theirs == (10000.0 if spelling == "nowhere" else 123.0)


@pytest.mark.parametrize("config", [LlamaConfig, GPT2Config])
def test_what_a_config_does_not_say_is_as_transformers_has_it(config: Any) -> None:
    """A file of the sizes alone, beside the same with every default of transformers spelled out."""
    if config is LlamaConfig:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    else:
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4}
    spelled_out = config(**sizes).to_dict()
    short = from_their_config(sizes | {"model_type": config.model_type}, name="x", vocab_multiple=128)
    assert short == from_their_config(spelled_out, name="x", vocab_multiple=128)
    assert dropouts(spelled_out) == (
        [] if config is LlamaConfig else ["attn_pdrop=0.1", "embd_pdrop=0.1", "resid_pdrop=0.1"]
    )
