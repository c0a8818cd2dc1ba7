"""The difference of two configs."""

from __future__ import annotations

from distllm.config.compare import PlainConfig, changed_settings

OLD: PlainConfig = {"train": {"steps": 5, "seed": 1}, "data": {"path": None}, "run": {"dir": "a"}}
NEW: PlainConfig = {
    "train": {"steps": 9, "seed": 1},
    "data": {"path": "x/*"},
    "run": {"dir": "b"},
    "zero": {"stage": 1},
}


def test_values_are_told_as_they_are_written() -> None:
    assert changed_settings(OLD, NEW) == {
        "data.path": ("null", "x/*"),
        "run.dir": ("a", "b"),
        "train.steps": ("5", "9"),
        "zero.stage": ("unset", "1"),
    }


def test_sections_may_be_left_out() -> None:
    assert changed_settings(OLD, NEW, without=("run", "zero", "data")) == {"train.steps": ("5", "9")}
    assert changed_settings(NEW, NEW) == {}
