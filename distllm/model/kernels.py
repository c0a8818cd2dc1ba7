"""The model's operations between its matrix products; as written, or compiled into one kernel each.

Regions, not whole layers: these functions hold no parameter, hook or collective, so that compiling them
cannot affect ZeRO, tensor parallelism or recomputation, and takes seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return x / rms(x) * weight over the last dim (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


def swiglu(x: Tensor) -> Tensor:
    """Map gate and up, [..., 2 * ffn], to silu(gate) * up, [..., ffn] (Shazeer 2020, arXiv:2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def split_heads(
    mixed: Tensor, num_groups: int, head_dim: int, cos_sin: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Split one projection into query, key and value; rotate query and key by their positions.

    mixed: [seq, batch, groups * (heads/groups + 2) * head_dim], the queries of a group, its key, its value.
    cos_sin: [2, seq, 1, 1, head_dim/2] (RoFormer, arXiv:2104.09864, in GPT-NeoX's order of dims), or None for
        no rotation.

    Returns [seq, batch, heads, head_dim], and twice [seq, batch, groups, head_dim].
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


def exponentials(logits: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Compute exp(logits - largest) in place; return it and its sums over rows, in fp32.

    logits: [tokens, vocab/tp]; largest: [tokens].
    """
    result = logits.float().sub_(largest[:, None]).exp_()
    return logits.copy_(result), result.sum(1)


def causal_exponentials(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute exp(score - largest of the row) in place, 0 for keys in the future.

    scores: [groups, heads per group, rows, seen], of the last `rows` of `seen` tokens.

    Returns these, their sums over rows and the largest score of each row, the latter two [groups, heads per
    group, rows, 1] in fp32.
    """
    result = _hide_future(scores.float())
    largest = result.amax(-1, keepdim=True)
    result.sub_(largest).exp_()
    return scores.copy_(result), result.sum(-1, keepdim=True), largest


def causal_gradients(
    scores: Tensor, grads: Tensor, normalizer: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute (probabilities, gradients of the scores), in place of the scores and of `grads`.

    scores, grads: [groups, heads per group, rows, seen], the second of the probabilities.
    normalizer: log of the sum of exp(score); offset: sum of gradient times probability; both [groups, heads
        per group, rows, 1] in fp32.
    """
    probabilities = _hide_future(scores.float()).sub_(normalizer).exp_()
    grad_scores = grads.float().sub_(offset).mul_(probabilities)
    return scores.copy_(probabilities), grads.copy_(grad_scores)


def _hide_future(scores: Tensor) -> Tensor:
    """Set keys after the row's own token to -inf, in place."""
    rows, seen = scores.shape[-2:]
    future = torch.full((rows, rows), -torch.inf, device=scores.device).triu_(1)
    scores[..., seen - rows :].add_(future)
    return scores


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum of x * y over the last dim, in fp32."""
    return (x.float() * y.float()).sum(-1)


@dataclass(frozen=True)
class Kernels:
    """The functions above, or their replacements."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    swiglu: Callable[[Tensor], Tensor] = swiglu
    split_heads: Callable[[Tensor, int, int, Tensor | None], tuple[Tensor, Tensor, Tensor]] = split_heads
    exponentials: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = exponentials
    causal_exponentials: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] = causal_exponentials
    causal_gradients: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = causal_gradients
    row_dot: Callable[[Tensor, Tensor], Tensor] = row_dot


AS_WRITTEN = Kernels()


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Use `kernels` in training steps of `model`; elsewhere shapes vary, and uncompiled kernels run."""
    modules: Any = model.modules()
    for module in modules:
        if hasattr(module, "kernels"):
            module.kernels = kernels


def compiled(warn: Callable[[str], None]) -> Kernels:
    """Return compiled kernels; one whose first call fails runs as written, and `warn` reports it.

    They are for training steps, whose shapes never change: every further shape would be compiled anew, but
    for blocks of scores. Kernels are cached on disk, in TORCHINDUCTOR_CACHE_DIR.
    """
    # Worker processes for compiling would outlive it, and a forked rank cannot start them.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    static, dynamic = (partial(_WithFallback, is_dynamic=value, warn=warn) for value in (False, True))
    return Kernels(
        rms_norm=static(rms_norm),
        swiglu=static(swiglu),
        split_heads=static(split_heads),
        exponentials=static(exponentials),
        causal_exponentials=dynamic(causal_exponentials),  # each block of queries sees more keys
        causal_gradients=dynamic(causal_gradients),
        row_dot=static(row_dot),
    )


class _WithFallback:
    """A compiled function that falls back to the original when it fails, but for want of memory."""

    def __init__(self, function: Callable[..., Any], is_dynamic: bool, warn: Callable[[str], None]) -> None:
        self._as_written = function
        self._warn = warn
        self._function = torch.compile(function, fullgraph=True, dynamic=is_dynamic)

    def __call__(self, *arguments: Any) -> Any:
        if self._function is self._as_written:
            return self._as_written(*arguments)
        try:
            return self._function(*arguments)
        except torch.OutOfMemoryError:
            raise  # a full device says nothing about the compiler
        except Exception as error:  # a missing compiler, or a compiler bug: there is no common class
            self._function = self._as_written
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._warn(f"{self._as_written.__name__} runs uncompiled: {reason}")
            return self._as_written(*arguments)
