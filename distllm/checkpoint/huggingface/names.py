"""Our tensors and Hugging Face's, name by name: what each of ours is called there, and how its rows lie.

Pure. Ours are those of `model/sharding.py`; theirs are the parameters of `LlamaForCausalLM` and
`GPT2LMHeadModel` in the library transformers. Rotary positions pair the same dimensions in both, so the rows
within a head stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from distllm.config.schema import Model
from distllm.layout.fragment import Fragment
from distllm.layout.place import Place, Shape

Family = Literal["llama", "gpt2"]

LAYERS = "decoder.layers."
THEIR_LAYERS = {"llama": "model.layers.", "gpt2": "transformer.h."}
# Module -> modules; of several, each takes a share of the rows, in this order. Below: modules of a layer.
MODULES: dict[Family, dict[str, tuple[str, ...]]] = {
    "llama": {
        "embedding.word_embeddings": ("model.embed_tokens",),
        "decoder.final_layernorm": ("model.norm",),
        "output_layer": ("lm_head",),
    },
    "gpt2": {
        "embedding.word_embeddings": ("transformer.wte",),
        "embedding.position_embeddings": ("transformer.wpe",),
        "decoder.final_layernorm": ("transformer.ln_f",),
        "output_layer": ("lm_head",),
    },
}
LAYER_MODULES: dict[Family, dict[str, tuple[str, ...]]] = {
    "llama": {
        "input_layernorm": ("input_layernorm",),
        "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attention.linear_proj": ("self_attn.o_proj",),
        "pre_mlp_layernorm": ("post_attention_layernorm",),
        "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.linear_fc2": ("mlp.down_proj",),
    },
    "gpt2": {
        "input_layernorm": ("ln_1",),
        "self_attention.linear_qkv": ("attn.c_attn",),
        "self_attention.linear_proj": ("attn.c_proj",),
        "pre_mlp_layernorm": ("ln_2",),
        "mlp.linear_fc1": ("mlp.c_fc",),
        "mlp.linear_fc2": ("mlp.c_proj",),
    },
}
VOCABULARY_TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class Counterpart:
    """One tensor of ours and the tensors that hold the same weights there.

    name: canonical. shape: [rows, ...], gated projections as [2 * ffn, ...]. their_names: in the order of
    their rows. vocab_size: tokens; our vocabulary tables have padding below them, theirs have none.
    """

    name: str
    shape: Shape
    their_names: tuple[str, ...]
    family: Family
    model: Model
    vocab_size: int

    @property
    def global_shape(self) -> Shape:
        """As `Place` has it: a gated projection is [2, ffn, ...], gate and up projection."""
        if self._is_gated:
            return (2, self.shape[0] // 2, *self.shape[1:])
        return self.shape

    @cached_property
    def their_shapes(self) -> dict[str, Shape]:
        rows = self._their_rows()
        shapes = [(count, *self.shape[1:]) for count in rows]
        if self._is_transposed:
            shapes = [tuple(reversed(shape)) for shape in shapes]
        return dict(zip(self.their_names, shapes, strict=True))

    def fragment(self, weight: Tensor) -> Fragment:
        """`weight`, contiguous, as the one piece of this parameter."""
        shape = self.global_shape
        place = Place(self.name, shape, shape, (0,) * len(shape), primary=True)
        return Fragment(place, 0, weight.numel(), {"weight": weight.view(-1)}, writer=True)

    def export_tensors(self, weight: Tensor) -> dict[str, Tensor]:
        """`weight` in either of our shapes -> {their name: tensor of its own memory}."""
        rows = weight.reshape(self.shape)
        if self._is_qkv:
            rows = split_qkv(rows, self.model)
        elif self._is_vocabulary:
            rows = rows[: self.vocab_size]
        parts = rows.split(self._their_rows())
        if self._is_transposed:
            parts = tuple(part.T for part in parts)
        return {
            name: part.clone(memory_format=torch.contiguous_format)
            for name, part in zip(self.their_names, parts, strict=True)
        }

    def import_tensors(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `export_tensors`, of `shape`, in fp32; rows of padding are 0."""
        parts = [tensors[name].to(torch.float32) for name in self.their_names]
        rows = torch.cat([part.T for part in parts] if self._is_transposed else parts)
        if self._is_qkv:
            rows = join_qkv(rows, self.model)
        elif self._is_vocabulary:
            padding = self.shape[0] - self.vocab_size
            rows = torch.cat([rows, rows.new_zeros(padding, self.shape[1])])
        return rows.contiguous()

    def _their_rows(self) -> list[int]:
        """Rows of each of their tensors, before GPT-2's are transposed."""
        if self._is_vocabulary:
            return [self.vocab_size]
        if self._is_qkv and len(self.their_names) == 3:
            model = self.model
            width = model.resolved_head_dim
            return [count * width for count in (model.num_attention_heads, *[model.num_query_groups] * 2)]
        return [self.shape[0] // len(self.their_names)] * len(self.their_names)

    @property
    def _is_vocabulary(self) -> bool:
        return self.name in VOCABULARY_TABLES

    @property
    def _is_qkv(self) -> bool:
        return ".linear_qkv." in self.name

    @property
    def _is_gated(self) -> bool:
        return ".linear_fc1." in self.name and self.model.activation == "swiglu"

    @property
    def _is_transposed(self) -> bool:
        """GPT-2 of transformers keeps its projections as [in, out]."""
        return self.family == "gpt2" and ".linear_" in self.name and self.name.endswith(".weight")


def counterparts(
    family: Family, model: Model, vocab_size: int, shapes: Mapping[str, Shape]
) -> list[Counterpart]:
    """One for each tensor of `shapes`, in the same order.

    shapes: {canonical name: shape} of the whole model, as `plan/parameters.py` lists them.
    """
    return [
        Counterpart(name, shape, _their_names(family, name), family, model, vocab_size)
        for name, shape in shapes.items()
    ]


def _their_names(family: Family, name: str) -> tuple[str, ...]:
    module, _, kind = name.rpartition(".")
    if not module.startswith(LAYERS):
        return tuple(f"{theirs}.{kind}" for theirs in MODULES[family][module])
    layer, _, module = module.removeprefix(LAYERS).partition(".")
    prefix = f"{THEIR_LAYERS[family]}{layer}."
    return tuple(f"{prefix}{theirs}.{kind}" for theirs in LAYER_MODULES[family][module])


def split_qkv(rows: Tensor, model: Model) -> Tensor:
    """Rows by query group (queries, key, value) -> all queries, then all keys, then all values."""
    groups, width = model.num_query_groups, model.resolved_head_dim
    per_group = model.num_attention_heads // groups
    grouped = rows.view(groups, per_group + 2, width, *rows.shape[1:])  # [groups, q.. k v, width, ...]
    parts = grouped.split([per_group, 1, 1], dim=1)
    return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in parts])


def join_qkv(rows: Tensor, model: Model) -> Tensor:
    """The inverse of `split_qkv`."""
    heads, groups, width = model.num_attention_heads, model.num_query_groups, model.resolved_head_dim
    parts = rows.split([heads * width, groups * width, groups * width])
    grouped = [part.reshape(groups, -1, width, *rows.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).reshape(rows.shape)
