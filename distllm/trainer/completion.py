"""Text generation: one token after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def sample_tokens(
    logits: Callable[[Tensor], Tensor],
    prompt: list[int],
    *,
    max_tokens: int,
    seq_length: int,
    end_of_document: int,
    temperature: float,
    top_k: int,
    seed: int,
    device: torch.device,
) -> list[int]:
    """Return the tokens that continue `prompt`, up to the end of the document or `max_tokens`.

    The same seed gives the same text on every rank, so that ranks which share the model stay in step.

    logits: [1, seq] -> [1, seq, vocab]; it is given at most the last seq_length tokens.
    """
    assert prompt, "a model needs a token to start from"
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_tokens):
        window = torch.tensor([tokens[-seq_length:]], device=device)
        token = choose_token(logits(window)[0, -1].float().cpu(), temperature, top_k, generator)
        if token == end_of_document:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def choose_token(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Choose one token from [vocab] logits.

    It is the most likely one at temperature 0, else it is sampled from the top_k most likely (0: from all).
    """
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < logits.numel():
        values, indices = logits.topk(top_k)
    else:
        values, indices = logits, torch.arange(logits.numel())
    probabilities = torch.softmax(values / temperature, dim=-1)
    return int(indices[torch.multinomial(probabilities, 1, generator=generator)])
