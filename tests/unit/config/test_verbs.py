"""The table of verbs: each entry leads to what it names."""

from __future__ import annotations

import inspect

import pytest

from distllm.config.registry import imported
from distllm.config.verbs import VERBS, find


@pytest.mark.parametrize("name", VERBS)
def test_every_entry_leads_to_its_functions(name: str) -> None:
    verb = VERBS[name]
    assert (verb.name, find(name)) == (name, verb)
    assert list(inspect.signature(imported(f"{verb.module}:run")).parameters) == ["config", "request"]
    assert len(inspect.signature(imported(verb.on_refusal)).parameters) == 2


def test_names_old_and_new_lead_to_one_verb_each() -> None:
    names = [name for verb in VERBS.values() for name in (verb.name, *verb.former_names)]
    assert len(set(names)) == len(names)
    assert find("trace") is find("lineage")


def test_actions_of_checkpoint_are_those_that_it_can_do() -> None:
    from distllm.verbs import checkpoint

    assert VERBS["checkpoint"].actions == tuple(checkpoint.ACTIONS) == tuple(checkpoint.USED)
