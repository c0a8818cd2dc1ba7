"""What `distllm config` reads from the schema: every setting has a meaning, and a type for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

import pytest
from pydantic import Field

from distllm.config import meanings
from distllm.config.data_schema import MixtureChange, Source
from distllm.config.registry import Registry
from distllm.config.schema import Beta, PositiveInt
from distllm.config.validate import SECTIONS, SETTINGS


@pytest.mark.parametrize("section", [*SECTIONS.values(), Source, MixtureChange])
def test_the_schema_says_what_each_setting_means(section: type) -> None:
    told = meanings.meanings(section)
    assert set(told) == set(get_type_hints(section)), f"complete the docstring of {section.__name__}"
    assert all(len(meaning) >= 10 and "`Source`" not in meaning for meaning in told.values())


def test_every_setting_is_described_once() -> None:
    names = [setting.name for setting in meanings.all_settings()]
    assert len(set(names)) == len(names)
    assert [name for name in names if name.count(".") == 1] == list(SETTINGS)
    beneath = {name.rpartition(".")[0] for name in names if name.count(".") > 1}
    assert beneath == {"data.sources.NAME", "data.changes.N"}


@dataclass
class Toy:
    """Stands for a section. As a whole.

    low: of two; the larger: not this one. high, none: on one line, None: a word.
        And more of it.
    A sentence about low and high that stays with what is before it.

    Another paragraph, after which low: is no entry.
    last: the end. second: after it.
    """

    low: int
    high: int
    none: int
    last: int
    second: int = 3


def test_the_forms_of_a_docstring() -> None:
    shared = (
        "on one line, null: a word. And more of it. "
        "A sentence about low and high that stays with what is before it"
    )
    assert meanings.meanings(Toy) == {
        "low": "of two; the larger: not this one",
        "high": shared,
        "none": shared,
        "last": "the end",
        "second": "after it",
    }
    whole, other = meanings.summary(Toy).split("\n\n")
    assert whole == "Stands for a section. As a whole."
    assert other == "Another paragraph, after which low: is no entry."
    defaults = {setting.name: setting.default for setting in meanings._settings(Toy, "toy")}
    assert defaults["toy.low"] is meanings.REQUIRED
    assert defaults["toy.second"] == 3


def test_a_setting_without_a_meaning_is_a_mistake_of_ours() -> None:
    @dataclass
    class Silent:
        """said: something."""

        said: int
        unsaid: int

    with pytest.raises(AssertionError, match="does not say what unsaid means"):
        list(meanings._settings(Silent, "silent"))


PARTS = Registry({"adamw": "nowhere:ADAMW", "muon": "nowhere:MUON"})
READABLE: list[tuple[Any, str]] = [
    (bool, "true | false"),
    (bool | None, "true | false | null"),
    (str | None, "text or null"),
    (PositiveInt | None, "integer > 0 or null"),
    (Annotated[int, Field(ge=0, lt=2**32)], "integer >= 0 and < 4294967296"),
    (Annotated[str, Field(strict=False)], "text"),
    (Literal["fp32", "bf16"], "fp32 | bf16"),
    (Literal[0, 1], "0 | 1"),
    (Literal["a", "b"] | Literal["c"] | None, "a | b | c | null"),
    (Annotated[tuple[Beta, Beta], Field(strict=False)], "[number >= 0 and < 1, number >= 0 and < 1]"),
    (list[str], "list of text"),
    (list[MixtureChange], "list of {step, weights}"),
    (dict[str, float], "{NAME: number}"),
    (Annotated[str, PARTS.choice()], "adamw | muon"),
    (Annotated[str, PARTS.choice("none")], "adamw | muon | none"),
]


@pytest.mark.parametrize(("annotation", "expected"), READABLE, ids=[text for _, text in READABLE])
def test_types_are_readable(annotation: Any, expected: str) -> None:
    assert meanings.readable(annotation) == expected
