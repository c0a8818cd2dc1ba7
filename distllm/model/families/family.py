"""The interface of a model family."""

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
    """A model family. Only the methods that build a layer import modules that need torch.

    rules: conditions on the settings of a model, one function each, as in `config/rules.py`.
    layer_order: the modules of a layer that hold parameters, in the order in which the forward pass runs
        them: backward passes, ZeRO-3's gathers and buckets of gradients follow it.
    huggingface: its form in the library transformers; None where there is none.
    """

    rules: tuple[Callable[[Model], Iterator[Problem]], ...] = ()
    layer_order: tuple[str, ...] = ()
    huggingface: HuggingFaceForm | None = None

    @abstractmethod
    def embedding(self, model: Model, num_rows: int) -> list[Parameter]:
        """Return the parameters before the layers. num_rows: of vocabulary tables."""

    @abstractmethod
    def layer(self, model: Model, number: int) -> list[Parameter]:
        """Return the parameters of a layer in the order in which its module registers them; ZeRO cuts by it.

        number: counted from 0 over the whole model.
        """

    @abstractmethod
    def head(self, model: Model, num_rows: int) -> list[Parameter]:
        """Return the parameters after the layers; a tied output projection is left out."""

    @abstractmethod
    def activations(self, model: Model, tensor: int = 1, sequence: bool = False) -> int:
        """Return elements per token that one layer keeps for its backward pass on a rank."""

    @abstractmethod
    def flops_per_token(self, model: Model, vocab_size: int) -> float:
        """Return floating-point operations of forward and backward pass, per token."""

    @abstractmethod
    def transformer_arguments(self, model: Model) -> dict[str, Any]:
        """Return the part of Megatron Core's TransformerConfig that describes the model."""

    @abstractmethod
    def gpt_arguments(self, model: Model) -> dict[str, Any]:
        """Return the part of the arguments of Megatron Core's GPTModel that describes the model."""

    @abstractmethod
    def layer_spec(self, model: Model, number: int) -> Any:
        """Return Megatron Core's specification of layer `number`."""

    @abstractmethod
    def final_norm(self, model: Model) -> Any:
        """Return the module after the last layer."""


def family_of(model: Model) -> Family:
    family: Family = FAMILIES[model.family]
    return family
