"""A kind of source that registers itself is a kind like any other, in every process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from corpora import documents_of, silent

from distllm.config import compose
from distllm.config.problems import UserError
from distllm.config.registry import PLUGINS, SOURCES, load_plugins
from distllm.data.preparation import workers
from distllm.data.preparation.prepare import prepare
from distllm.data.sources import SourceKind
from distllm.data.tokenizer import TextTokenizer

PACKAGE = Path(__file__).parents[3] / "distllm"
KINDS = "'text', 'jsonl', 'parquet', 'arrow', 'megatron', 'huggingface'"
HEAVY = ("torch", "numpy", "pyarrow", "datasets", "tokenizers", "transformers")


@pytest.fixture
def fortune(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind of `fortune_source.py`, registered for one test."""
    monkeypatch.setattr(SOURCES, "_parts", dict(SOURCES._parts))
    monkeypatch.delitem(sys.modules, "fortune_source", raising=False)
    monkeypatch.setenv(PLUGINS, "fortune_source")
    load_plugins()


@pytest.mark.usefixtures("fortune")
def test_its_documents_are_prepared_by_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("this process knows the kind; the others must")

    monkeypatch.setattr(workers, "_make_here", refuse)
    documents = [f"saying {number}\nof many" for number in range(40)]
    (tmp_path / "sayings").mkdir()
    for number in range(20):
        text = "\n%\n".join([*documents[2 * number : 2 * number + 2], *[""] * (number == 7)])
        (tmp_path / f"sayings/{number:02d}").write_text(text)
    overrides = ["data=text", "data.source=fortune", f"data.path={tmp_path}/sayings/*", "tokenizer=bytes"]
    settings = ["data.validation_fraction=0", f"data.cache={tmp_path}/cache", "preparation.workers=2"]
    config = compose.load(compose.parse("data", [*overrides, *settings]))
    prepared = prepare(config.data, config.preparation, config.tokenizer, silent, unit_bytes=1)
    source = prepared.sources["fortune"]
    tokenizer = TextTokenizer.load(prepared.tokenizer_folder, config.tokenizer.end_of_document)
    decoded = [tokenizer.decode_bytes(tokens[:-1]).decode() for tokens in documents_of(source.train.prefix)]
    assert decoded == documents
    rejected = f'{{"file": "{tmp_path}/sayings/07", "row": 2, "reason": "empty", "detail": ""}}\n'
    assert (source.folder / "quarantine.jsonl").read_text() == rejected


@pytest.mark.usefixtures("fortune")
def test_its_settings_are_checked_like_those_of_other_files() -> None:
    sources = ["data.sources.a.source=fortune", "data.sources.b={source: fortune, path: 'nothing/*'}"]
    with pytest.raises(UserError) as caught:
        compose.load(compose.parse("data", ["data=mixture", "tokenizer=bytes", *sources]))
    assert [(problem.setting, problem.rule.split(";")[0]) for problem in caught.value.problems] == [
        ("data.sources.a.path", "is required for data.sources.a.source=fortune"),
        ("data.sources.b.path", "must match files"),
    ]


def test_the_package_does_not_know_it() -> None:
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.parent.joinpath("conf").rglob("*.yaml")]
    assert len(files) > 100
    assert [file for file in files if "fortune" in file.read_text()] == []


@pytest.mark.parametrize(
    ("written", "others", "nearest"),
    [
        ("data.source=parket", " or 'mixture'", "parquet"),
        ("data.source=mixtrue", " or 'mixture'", "mixture"),
        ("data.source=null", " or 'mixture'", "text"),
        ("data.sources.a.source=jsnl", "", "jsonl"),
        ("data.sources.a.source=mixture", "", "text"),  # not a mixture of mixtures
        ("data.sources.a.source=fortune", "", "text"),  # not registered here
    ],
)
def test_a_name_that_is_no_kind_gets_the_list_and_the_nearest(
    written: str, others: str, nearest: str
) -> None:
    setting, _, value = written.partition("=")
    with pytest.raises(UserError) as caught:
        compose.load(compose.parse("data", ["data=mixture", "tokenizer=bytes", written]))
    [problem] = [problem for problem in caught.value.problems if problem.setting == setting]
    names = f"{KINDS}, 'stdlib'{others}" if others else f"{KINDS} or 'stdlib'"
    assert (problem.rule, problem.fix) == (f"must be {names}", f"{setting}={nearest}")
    assert problem.value == (None if value == "null" else value)


def test_the_table_holds_source_kinds() -> None:
    assert all(isinstance(SOURCES[name], SourceKind) for name in SOURCES)


def test_a_mistake_is_told_without_the_libraries_that_read() -> None:
    script = f"""
import sys
from distllm.config.data_schema import Source
from distllm.config.registry import SOURCES
for name in SOURCES:
    for path in (None, "nothing/*"):
        source = Source(name, path)
        told = [*SOURCES[name].problems("data", source), *SOURCES[name].environment_problems("data", source)]
        print(name, path, len(told))
print([name for name in {HEAVY} if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *told, imported = run.stdout.splitlines()
    assert told == [
        f"{name} {path} {number}"
        for name in SOURCES
        for path, number in ((None, int(name != "stdlib")), ("nothing/*", int(name != "huggingface")))
    ]
    assert imported == "[]"
