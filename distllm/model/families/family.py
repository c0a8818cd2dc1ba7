"""What the rest of the package asks of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from distllm.config.problems import Problem
from distllm.config.registry import FAMILIES
from distllm.config.schema import Model
from distllm.layout.parameter import Parameter

if TYPE_CHECKING:
    from distllm.model.families.huggingface import HuggingFaceForm


class Family(ABC):
    """A model family. What costs torch is imported by the methods that build a layer, and nowhere else.

    rules: what the settings of a model must have in common, one function each, as in `config/rules.py`.
    layer_order: the modules of a layer that hold parameters, in the order in which the forward pass runs
    them: backward passes, ZeRO-3's gathers and buckets of gradients follow it. huggingface: its form in the
    library transformers; None where there is none.
    """

    rules: tuple[Callable[[Model], Iterator[Problem]], ...] = ()
    layer_order: tuple[str, ...] = ()
    huggingface: HuggingFaceForm | None = None

    @abstractmethod
    def embedding(self, model: Model, num_rows: int) -> list[Parameter]:
        """Parameters ahead of the layers. num_rows: of vocabulary tables."""

    @abstractmethod
    def layer(self, model: Model, number: int) -> list[Parameter]:
        """Parameters of a layer, in the order in which its module registers them, by which ZeRO cuts.

        number: counted from 0 over the whole model.
        """

    @abstractmethod
    def head(self, model: Model, num_rows: int) -> list[Parameter]:
        """Parameters behind the layers; without the output projection where it is tied to the embedding."""

    @abstractmethod
    def activations(self, model: Model, tensor: int = 1, sequence: bool = False) -> int:
        """Elements per token that one layer keeps for its backward pass on a rank."""

    @abstractmethod
    def flops_per_token(self, model: Model, vocab_size: int) -> float:
        """Floating-point operations of forward and backward pass, per token."""

    @abstractmethod
    def transformer_arguments(self, model: Model) -> dict[str, Any]:
        """The part of Megatron Core's TransformerConfig that describes the model."""

    @abstractmethod
    def gpt_arguments(self, model: Model) -> dict[str, Any]:
        """The part of the arguments of Megatron Core's GPTModel that describes the model."""

    @abstractmethod
    def layer_spec(self, model: Model, number: int) -> Any:
        """Megatron Core's specification of layer `number`."""

    @abstractmethod
    def final_norm(self, model: Model) -> Any:
        """The module behind the last layer."""


def family_of(model: Model) -> Family:
    family: Family = FAMILIES[model.family]
    return family
