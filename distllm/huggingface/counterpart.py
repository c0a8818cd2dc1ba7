"""Map our tensors to Hugging Face's, name by name, with the order of their rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distllm.config.schema import Model
from distllm.huggingface.config import as_exported, form_of
from distllm.layout.fragment import Fragment
from distllm.layout.parameter import Parameter
from distllm.layout.place import Place, Shape
from distllm.model.parameters import parameters_of


@dataclass(frozen=True)
class Counterpart:
    """One tensor of ours and the tensors that hold the same weights there.

    their_names: in the order of their rows.
    is_transposed: theirs are [in, out].
    vocab_size: tokens; our vocabulary tables have padding below them, theirs have none.
    """

    parameter: Parameter
    their_names: tuple[str, ...]
    is_transposed: bool
    model: Model
    vocab_size: int

    @property
    def name(self) -> str:
        return self.parameter.name

    @property
    def global_shape(self) -> Shape:
        return self.parameter.shape

    @property
    def shape(self) -> Shape:
        """Return [rows, ...]: stacked projections below each other."""
        return self.parameter.module_shape({self.parameter.cut_axis: 1})

    @cached_property
    def their_shapes(self) -> dict[str, Shape]:
        shapes = [(count, *self.shape[1:]) for count in self._their_rows()]
        if self.is_transposed:
            shapes = [tuple(reversed(shape)) for shape in shapes]
        return dict(zip(self.their_names, shapes, strict=True))

    def fragment(self, weight: Tensor) -> Fragment:
        """Return `weight`, contiguous, as the one piece of this parameter."""
        shape = self.global_shape
        place = Place(self.name, shape, shape, (0,) * len(shape), primary=True)
        return Fragment(place, 0, weight.numel(), {"weight": weight.view(-1)}, writer=True)

    def export_tensors(self, weight: Tensor) -> dict[str, Tensor]:
        """Return {their name: tensor of its own memory} from `weight` in either of our shapes."""
        rows = weight.reshape(self.shape)
        if self.parameter.rows == "query key value":
            rows = split_qkv(rows, self.model)
        elif self.parameter.rows == "vocabulary":
            rows = rows[: self.vocab_size]
        parts = rows.split(self._their_rows())
        if self.is_transposed:
            parts = tuple(part.T for part in parts)
        return {
            name: part.clone(memory_format=torch.contiguous_format)
            for name, part in zip(self.their_names, parts, strict=True)
        }

    def import_tensors(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Invert `export_tensors`; the result has `shape`, in fp32; rows of padding are 0."""
        parts = [tensors[name].to(torch.float32) for name in self.their_names]
        rows = torch.cat([part.T for part in parts] if self.is_transposed else parts)
        if self.parameter.rows == "query key value":
            rows = join_qkv(rows, self.model)
        elif self.parameter.rows == "vocabulary":
            padding = self.shape[0] - self.vocab_size
            rows = torch.cat([rows, rows.new_zeros(padding, self.shape[1])])
        return rows.contiguous()

    def _their_rows(self) -> list[int]:
        """Return the number of rows of each of their tensors, before they are transposed."""
        if self.parameter.rows == "vocabulary":
            return [self.vocab_size]
        if self.parameter.rows == "query key value" and len(self.their_names) == 3:
            return _qkv_rows(self.model)
        return [self.shape[0] // len(self.their_names)] * len(self.their_names)


def counterparts(model: Model, vocab_size: int) -> list[Counterpart]:
    """Return one for each tensor of the model. User error: a model that transformers does not support."""
    model = as_exported(model)
    form = form_of(model)
    return [
        Counterpart(p, form.their_names(p), form.is_transposed(p), model, vocab_size)
        for p in parameters_of(model, model.padded_vocab_size(vocab_size))
    ]


def split_qkv(rows: Tensor, model: Model) -> Tensor:
    """Reorder rows by query group (queries, key, value) to all queries, then all keys, then all values."""
    groups, width = model.num_query_groups, model.resolved_head_dim
    per_group = model.num_attention_heads // groups
    grouped = rows.view(groups, per_group + 2, width, *rows.shape[1:])  # [groups, q.. k v, width, ...]
    parts = grouped.split([per_group, 1, 1], dim=1)
    return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in parts])


def join_qkv(rows: Tensor, model: Model) -> Tensor:
    """Invert `split_qkv`."""
    groups, width = model.num_query_groups, model.resolved_head_dim
    parts = rows.split(_qkv_rows(model))
    grouped = [part.reshape(groups, -1, width, *rows.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).reshape(rows.shape)


def _qkv_rows(model: Model) -> list[int]:
    """Return the number of rows of all queries, all keys, all values."""
    width = model.resolved_head_dim
    return [count * width for count in (model.num_attention_heads, *[model.num_query_groups] * 2)]
