"""The cause of an end is named once, by whoever comes first."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distllm.config.problems import user_error
from distllm.runtime.cause import LONGEST_REASON, Cause, Notice, describe
from distllm.runtime.ending import exit_code_of


def test_of_many_one_is_the_first_and_all_read_what_it_tells(tmp_path: Path) -> None:
    notices = [Notice(tmp_path) for _ in range(16)]
    notices[0].prepare()
    assert notices[3].read() is None
    assert [notice.is_claimed for notice in notices] == [False] * 16
    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(Notice.claim, notices)) == 1
    assert notices[3].is_claimed
    assert notices[3].wait(0.05) is None, "claimed, not told yet"
    cause = Cause(5, "rank 5 failed: ValueError: a\nb", 1)
    notices[5].tell(cause)
    assert notices[3].read() == notices[4].wait(1) == cause


def test_a_notice_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    notice = Notice(tmp_path)
    (tmp_path / "cause").write_text('{"rank": 5, "reason": "x", "exit_code": 1}')
    assert notice.read() is None
    (tmp_path / "cause").write_text('{"rank": 5, "reason": "x", "exit_code": 1}\n')
    assert notice.read() == Cause(5, "x", 1)


def test_where_nothing_can_be_written_nobody_waits_for_another(tmp_path: Path) -> None:
    notice = Notice(tmp_path / "missing")
    notice.prepare()
    assert notice.claim()
    notice.tell(Cause(0, "x", 1))
    assert notice.read() is None


def test_errors_in_short() -> None:
    assert describe(ValueError("a shape")) == "ValueError: a shape"
    assert len(describe(ValueError("x" * 9999))) == LONGEST_REASON
    mistake = user_error("data.path", "x", "must hold documents", "data.path=y")
    errors = [ValueError(), mistake, KeyboardInterrupt(), SystemExit(3), SystemExit("text"), SystemExit()]
    assert [exit_code_of(error) for error in errors] == [1, 2, 130, 3, 1, 0]
