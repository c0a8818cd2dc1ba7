"""One entry of the table of parameters: all that the package knows of a tensor of the model. Pure.

Families (`model/families/`) write the table. From it follow the places of a rank's parts, initial weights,
the optimizer's groups, parameter counts, memory, traffic, boxes of checkpoints and Hugging Face's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from distllm.layout.place import Shape

# matrix: maps one width to another in a product. table: rows that are looked up, or scores of them. vector:
# norms and biases, which act element by element.
Kind = Literal["matrix", "table", "vector"]
# The meaning of the rows (dim 0) of a tensor, where code that exchanges them with other formats needs their
# order.
Rows = Literal["", "query key value", "vocabulary"]

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"  # also the output projection where that is tied


@dataclass(frozen=True)
class Parameter:
    """A whole tensor of the model, which no layout changes.

    name: canonical: Megatron Core's, with the global layer number.
    shape: of the whole tensor. A projection that holds several of equal size, such as gate and up, has a dim
        for them in front: [2, ffn, hidden].
    kind: see above.
    initial: standard deviation of a normal distribution, or the value that fills it.
    is_constant: `initial` is that value.
    cut_dim: the dim of `shape` that is partitioned over the ranks of `cut_axis`; None means that each of them
        holds all of it.
    is_stacked: the first dim is not one of the module's, which holds the projections below each other.
    rows: see above.
    """

    name: str
    shape: Shape
    kind: Kind
    initial: float
    is_constant: bool = False
    cut_dim: int | None = None
    cut_axis: str = "tensor"
    is_stacked: bool = False
    rows: Rows = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_decayed(self) -> bool:
        """Return whether weight decay applies: not to parameters that act element by element."""
        return self.kind != "vector"

    @property
    def module(self) -> str:
        """Return the name of the module that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def module_cut_dim(self) -> int | None:
        """Return `cut_dim` as the module counts dims."""
        return None if self.cut_dim is None else self.cut_dim - self.is_stacked

    def local_shape(self, degrees: Mapping[str, int]) -> Shape:
        """Return the shape of one rank's part, under these degrees of parallelism by axis."""
        if self.cut_dim is None:
            return self.shape
        degree = degrees[self.cut_axis]
        whole = self.shape[self.cut_dim]
        assert whole % degree == 0, f"{self.name}: {whole} rows are not cut evenly over {degree} ranks"
        return (*self.shape[: self.cut_dim], whole // degree, *self.shape[self.cut_dim + 1 :])

    def module_shape(self, degrees: Mapping[str, int]) -> Shape:
        """Return the shape of one rank's part as the module holds it."""
        shape = self.local_shape(degrees)
        return (shape[0] * shape[1], *shape[2:]) if self.is_stacked else shape
