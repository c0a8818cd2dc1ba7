"""Parameter counts against what is published, operations against a count of the matrix products."""

import pytest

from distllm.config import compose
from distllm.config.schema import Model
from distllm.model.parameters import count_parameters, flops_per_token


def shape(name: str) -> Model:
    return compose.load(compose.parse("generate", [f"model={name}"])).model


@pytest.mark.parametrize(
    ("name", "vocab_size", "published"),
    [
        ("gpt2_124m", 50_257, 124_439_808),  # huggingface.co/openai-community/gpt2
        ("llama3_8b", 128_256, 8_030_261_248),  # huggingface.co/meta-llama/Meta-Llama-3-8B
        ("llama3_70b", 128_256, 70_553_706_496),  # huggingface.co/meta-llama/Meta-Llama-3-70B
        ("llama3_405b", 128_256, 405_853_388_800),  # huggingface.co/meta-llama/Llama-3.1-405B
    ],
)
def test_published_parameter_counts(name: str, vocab_size: int, published: int) -> None:
    assert count_parameters(shape(name), vocab_size).total == published


def test_flops_of_gpt2_by_counting_its_matrix_products() -> None:
    model = shape("gpt2_124m")
    hidden, seq = model.hidden_size, model.seq_length
    per_layer = 2 * (hidden * 3 * hidden + hidden * hidden + 2 * hidden * 4 * hidden)  # four projections
    scores = 2 * 2 * seq * hidden  # q k^T and probabilities times v, for one query
    forward = model.num_layers * (per_layer + scores) + 2 * hidden * 50_257
    # Norms and biases are in the parameter count and multiply too; they are 0.1% of it.
    assert flops_per_token(model, 50_257) == pytest.approx(3 * forward, rel=2e-3)
