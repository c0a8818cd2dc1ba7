"""The command line without its processes: which verb runs, and which exit code comes out."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

from distllm import __main__ as command
from distllm.config.compose import Request
from distllm.config.problems import UserError, user_error
from distllm.config.schema import Config
from distllm.config.verbs import VERBS
from distllm.runtime import ending

Run = Callable[[Config, Request], int]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Puts a function in the place of `distllm train`."""

    def install(run: Run) -> None:
        monkeypatch.setitem(VERBS, "train", replace(VERBS["train"], module="verb_of_this_test"))
        monkeypatch.setitem(sys.modules, "verb_of_this_test", SimpleNamespace(run=run))

    return install


def test_a_verb_gets_config_and_request_and_gives_the_exit_code(verb: Callable[[Run], None]) -> None:
    seen: list[object] = []

    def run(config: Config, request: Request) -> int:
        seen.extend([config.train.steps, request.verb.name, request.overrides])
        return 3

    verb(run)
    assert command.main(["train", "train.steps=7"]) == 3
    assert seen == [7, "train", ("train.steps=7",)]


def test_a_refused_config_is_for_the_verb_to_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verb itself is imported only once there is a sound config."""

    def mended(error: UserError, request: Request) -> Config:
        assert [problem.setting for problem in error.problems] == ["world size"]
        if request.world_size == 3:
            raise error
        assert error.config is not None
        return replace(error.config, train=replace(error.config.train, steps=7))

    toy = replace(VERBS["train"], module="no_such_module", on_refusal="mending_of_this_test:mended")
    monkeypatch.setitem(VERBS, "train", toy)
    monkeypatch.setitem(sys.modules, "mending_of_this_test", SimpleNamespace(mended=mended))
    monkeypatch.setenv("WORLD_SIZE", "3")
    broken = ["train", "parallel.tensor=2", "train.global_batch_size=12"]
    assert command.main(broken) == 2
    assert "world size=3" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        command.main(broken)
    run = SimpleNamespace(run=lambda config, _: config.train.steps)
    monkeypatch.setitem(sys.modules, "no_such_module", run)
    assert command.main(broken) == 7


@pytest.mark.parametrize(("error", "code"), [(ValueError("broken"), 1), (SystemExit(1), 1), (None, 3)])
def test_a_process_whose_groups_are_left_ends_at_once(
    error: BaseException | None,
    code: int,
    verb: Callable[[Run], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the usual message and exit code; and without that note it ends like any other program."""

    def run(*_: object) -> int:
        if error:
            raise error
        return 3

    def ends(code: int) -> None:
        raise Ended(code)

    verb(run)
    monkeypatch.setattr(os, "_exit", ends)
    monkeypatch.setattr(ending, "_state", {"groups are left": False})
    with pytest.raises(type(error)) if error else nullcontext():
        assert command.main(["train"]) == code
    assert capsys.readouterr().err == "", "the interpreter will print it"
    ending.leave_groups()
    with pytest.raises(Ended, match=str(code)):
        command.main(["train"])
    printed = capsys.readouterr().err
    assert ("Traceback" in printed) == ("ValueError: broken" in printed) == isinstance(error, ValueError)


class Ended(BaseException):
    """The process has ended."""


def test_an_interruption_is_quiet(verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    verb(interrupted)
    assert command.main(["train"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("rank", "lines"), [(None, 4), ("0", 4), ("1", 0)])
def test_a_mistake_found_by_a_verb_is_printed_by_one_rank(
    rank: str | None,
    lines: int,
    verb: Callable[[Run], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> int:
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
    flag: str, verb: Callable[[Run], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "to be taken back")
    monkeypatch.delenv("LOCAL_RANK")
    verb(lambda config, _: config.train.steps)
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


@pytest.mark.parametrize(("rank", "is_told"), [(None, True), ("0", True), ("1", False)])
def test_a_former_name_still_runs_and_says_the_new_one_once(
    rank: str | None,
    is_told: bool,
    verb: Callable[[Run], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verb(lambda config, request: len(request.verb.name) + config.train.steps)
    monkeypatch.setitem(VERBS, "train", replace(VERBS["train"], former_names=("practise",)))
    if rank:
        monkeypatch.setenv("RANK", rank)
    assert command.main(["practise", "train.steps=7"]) == 12
    told = "distllm practise is now called distllm train\n" if is_told else ""
    assert capsys.readouterr() == ("", told)


@pytest.mark.parametrize("name", ["check", "config", "checkpoint"])
def test_a_verb_that_cannot_be_swept_says_why(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    action = ["list"] if name == "checkpoint" else []
    assert command.main([name, *action, "-m", "train.seed=1,2"]) == 2
    message = capsys.readouterr().err
    assert f"arguments=--multirun\n    rule: {VERBS[name].no_sweep}\n" in message
    assert message.endswith(f"    fix:  distllm {name} for each of them\n")
