"""The command line without its processes: which verb runs, and which exit code comes out."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from distllm import __main__ as command
from distllm.config.problems import user_error
from distllm.config.schema import Config


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Config], int]], None]:
    """Puts a function in the place of `distllm train`."""

    def install(run: Callable[[Config], int]) -> None:
        monkeypatch.setitem(command.VERBS, "train", ("verb_of_this_test", "test"))
        monkeypatch.setitem(sys.modules, "verb_of_this_test", SimpleNamespace(run=run))

    return install


def test_a_verb_gets_the_config_and_gives_the_exit_code(verb: Callable[..., None]) -> None:
    steps: list[int] = []

    def run(config: Config) -> int:
        steps.append(config.train.steps)
        return 3

    verb(run)
    assert command.main(["train", "train.steps=7"]) == 3
    assert steps == [7]


def test_an_interruption_is_quiet(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: Config) -> int:
        raise KeyboardInterrupt

    verb(interrupted)
    assert command.main(["train"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("rank", "lines"), [(None, 4), ("0", 4), ("1", 0)])
def test_a_mistake_found_by_a_verb_is_printed_by_one_rank(
    rank: str | None,
    lines: int,
    verb: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(_: Config) -> int:
        raise user_error("data.path", "x", "must hold documents", "data.path=y")

    verb(refuse)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    if rank:
        monkeypatch.setenv("RANK", rank)
    assert command.main(["train"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == lines
    assert bool(waits) == (rank == "1")  # rank 0 must have spoken before a launcher ends it


@pytest.mark.parametrize("flag", ["--local_rank=3", "--local_rank 3", "--local-rank=3", "--local-rank 3"])
def test_the_rank_of_the_deepspeed_launcher_goes_to_the_environment(
    flag: str, verb: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "to be taken back")
    monkeypatch.delenv("LOCAL_RANK")
    verb(lambda config: config.train.steps)
    assert command.main([*flag.split(), "train", "train.steps=7"]) == 7
    assert os.environ["LOCAL_RANK"] == "3"
    assert command.main(["train", "--local_rank=5", "train.steps=7"]) == 7
    assert os.environ["LOCAL_RANK"] == "3"


@pytest.mark.parametrize(
    ("written", "fix"),
    [("trian", "distllm train"), ("tokeniser", "distllm tokenizer"), ("xyz", "distllm --help")],
)
def test_an_unknown_verb_is_refused(written: str, fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([written]) == 2
    assert f"verb={written}" in (message := capsys.readouterr().err)
    assert message.endswith(f"fix:  {fix}\n")
