"""What a layer does between its matrix products; as written, or compiled into one kernel each.

Regions, not whole layers: these functions hold no parameter, hook or collective, so that compiling them can
change nothing about ZeRO, tensor parallelism or recomputation, and takes seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last dim (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 * ffn], gate and up -> silu(gate) * up, [..., ffn] (Shazeer 2020, arXiv:2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def split_heads(
    mixed: Tensor, num_groups: int, head_dim: int, cos_sin: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value out of one projection, query and key rotated by their positions.

    mixed: [seq, batch, groups * (heads/groups + 2) * head_dim], the queries of a group, its key, its value.
    cos_sin: [2, seq, 1, 1, head_dim/2] (RoFormer, arXiv:2104.09864, in GPT-NeoX's order of dims), or None for
    no rotation. Returns [seq, batch, heads, head_dim], and twice [seq, batch, groups, head_dim].
    """
    seq, batch, _ = mixed.shape
    by_group = mixed.view(seq, batch, num_groups, -1)
    sizes = [by_group.size(3) - 2 * head_dim, head_dim, head_dim]
    query, key, value = by_group.split(sizes, dim=3)
    query = query.reshape(seq, batch, -1, head_dim)
    if cos_sin is not None:
        cos, sin = cos_sin.to(mixed.dtype)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    return query, key, value


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@dataclass(frozen=True)
class Operations:
    """The functions above, or what stands in for them."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    swiglu: Callable[[Tensor], Tensor] = swiglu
    split_heads: Callable[[Tensor, int, int, Tensor | None], tuple[Tensor, Tensor, Tensor]] = split_heads


AS_WRITTEN = Operations()


def compiled(warn: Callable[[str], None]) -> Operations:
    """Compiled where the first call of each succeeds; else as written, which `warn` is told.

    For the steps of training, whose shapes never change: every further shape would be compiled anew. Kernels
    are kept on disk, in TORCHINDUCTOR_CACHE_DIR.
    """
    # Compiling in worker processes would leave them behind, and a forked rank cannot start them.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    stand_in = partial(_WithFallback, warn=warn)
    return Operations(stand_in(rms_norm), stand_in(swiglu), stand_in(split_heads))


class _WithFallback:
    """A compiled function, until it fails."""

    def __init__(self, function: Callable[..., Any], warn: Callable[[str], None]) -> None:
        self._as_written = function
        self._warn = warn
        self._function = torch.compile(function, fullgraph=True, dynamic=False)

    def __call__(self, *arguments: Any) -> Any:
        if self._function is self._as_written:
            return self._as_written(*arguments)
        try:
            return self._function(*arguments)
        except Exception as error:  # a missing compiler, or a bug of one: there is no common class
            self._function = self._as_written
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._warn(f"{self._as_written.__name__} runs as it is written: not compiled: {reason}")
            return self._as_written(*arguments)
