"""Text from a model: which token is drawn, from which window, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distllm.trainer.completion import choose_token, sample_tokens

VOCAB_SIZE, END = 8, 7


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def draw(logits: Tensor, temperature: float, top_k: int, count: int) -> Tensor:
    """How often each token comes in `count` draws, as a share."""
    source = generator()
    drawn = [choose_token(logits, temperature, top_k, source) for _ in range(count)]
    return torch.bincount(torch.tensor(drawn), minlength=logits.numel()) / count


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.tensor([0.1, 3.0, 2.9, -1.0])
    assert draw(logits, temperature=0, top_k=0, count=20).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 2, 4, 100])
def test_draws_follow_the_softmax_of_the_top_k(temperature: float, top_k: int) -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -0.5])
    best = logits.topk(top_k).indices if 0 < top_k < 4 else torch.arange(4)
    expected = torch.zeros(4)
    expected[best] = torch.softmax(logits[best] / temperature, dim=0)
    count = 4000
    found = draw(logits, temperature, top_k, count)
    # Five standard errors of a share, at most 0.5 / sqrt(count).
    torch.testing.assert_close(found, expected, rtol=0, atol=5 * 0.5 / math.sqrt(count))
    assert torch.equal(found > 0, expected > 0), "nothing beyond the top k, everything within"


def test_top_one_is_the_likeliest_at_any_temperature() -> None:
    assert draw(torch.tensor([0.0, 0.1, 0.05]), temperature=50.0, top_k=1, count=20)[1] == 1


class Model:
    """Gives `rule(last token)` the largest logit, and remembers what it has seen."""

    def __init__(self, rule: Callable[[int], int]) -> None:
        self.rule = rule
        self.windows: list[list[int]] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        assert tokens.shape[0] == 1
        self.windows.append(tokens[0].tolist())
        logits = torch.zeros(*tokens.shape, VOCAB_SIZE)
        for position, token in enumerate(tokens[0].tolist()):
            logits[0, position, self.rule(token)] = 5.0
        return logits


def sample(model: Callable[[Tensor], Tensor], prompt: list[int], **changes: Any) -> list[int]:
    settings: dict[str, Any] = {
        "max_tokens": 20,
        "seq_length": 4,
        "end_of_document": END,
        "temperature": 0,
        "top_k": 0,
        "seed": 1,
        "device": torch.device("cpu"),
    }
    return sample_tokens(model, prompt, **settings | changes)


def test_the_end_of_the_document_ends_the_text_and_is_not_part_of_it() -> None:
    assert sample(Model(lambda token: token + 1), [2]) == [3, 4, 5, 6]


def test_the_last_position_decides_and_max_tokens_ends_it() -> None:
    assert sample(Model(lambda token: (token + 1) % 7), [1, 2, 5], max_tokens=3) == [6, 0, 1]


def test_the_model_sees_no_more_than_its_sequence_length() -> None:
    model = Model(lambda token: (token + 1) % 7)
    sample(model, [0, 1, 2], max_tokens=4)
    assert model.windows == [[0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]
    model.windows.clear()
    sample(model, [0, 1, 2, 3, 4, 5], max_tokens=1)
    assert model.windows == [[2, 3, 4, 5]], "also of the prompt"


def test_the_seed_decides_the_text() -> None:
    """Whatever the state of the global generator, which differs between ranks."""

    def logits(tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, VOCAB_SIZE)

    settings: dict[str, Any] = {"temperature": 1.0, "max_tokens": 30, "end_of_document": VOCAB_SIZE}
    first = sample(logits, [0], seed=5, **settings)
    torch.rand(7)
    assert sample(logits, [0], seed=5, **settings) == first
    assert sample(logits, [0], seed=6, **settings) != first
    assert len(set(first)) > 3


def test_a_prompt_of_nothing_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="needs a token"):
        sample(Model(lambda token: token), [])
