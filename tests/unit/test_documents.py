"""The documents are true where a test can tell: what they name exists, and the README stays short."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from distllm.config.verbs import VERBS, find

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "distllm"
README = ROOT / "README.md"
READMES = [README, *sorted(PACKAGE.glob("*/README.md")), ROOT / "docker" / "README.md"]
DOCUMENTS = [*READMES, *sorted((ROOT / ".github").rglob("*.md"))]
ROOMS = sorted(file for file in PACKAGE.rglob("__init__.py") if any(file.parent.glob("[!_]*.py")))
LONGEST_README = 170

# From the top of the repository, in prose and in commands.
PATH = re.compile(r"(?<![\w/.~-])(?:distllm|conf|launch|tests|docker|\.github|\.ci)(?:/[\w.*-]*[\w*])+")
CHOSEN = re.compile(r"\b(?:NAME|SHAPE)\b")  # stands for what a contributor chooses
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
FILE = re.compile(r"(?<![\w/.])(?:\w+/)*\w+\.py\b")
VERB = re.compile(r"(?<![\w/.-])distllm ([a-z]+)")


def names(document: Path) -> str:
    return str(document.relative_to(ROOT))


def exists(folder: Path, pattern: str) -> bool:
    return any(folder.glob(CHOSEN.sub("*", pattern)))


def missing_paths(text: str) -> list[str]:
    """Paths from the top of the repository that do not exist."""
    return [path for path in PATH.findall(text) if not exists(ROOT, path)]


def missing_links(text: str, folder: Path) -> list[str]:
    targets = (target.partition("#")[0] for target in LINK.findall(text) if "://" not in target)
    return [target for target in targets if target and not (folder / target).exists()]


def missing_files(text: str, folder: Path) -> list[str]:
    """Files that a tour names, seen from its room, the package or the repository."""
    bases = (folder, PACKAGE, ROOT)
    return [name for name in FILE.findall(text) if not any(exists(base, name) for base in bases)]


def verbs(text: str) -> Iterator[str]:
    """Words after `distllm` in code."""
    for code in CODE.findall(text):
        yield from VERB.findall(code)


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_what_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    assert missing_paths(text) + missing_links(text, document.parent) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_every_verb_is_one(document: Path) -> None:
    told = list(verbs(document.read_text()))
    if document.name == "CHANGELOG.md":  # tells of former names, too
        told = [find(verb).name for verb in told]
    assert [verb for verb in told if verb not in VERBS] == []


@pytest.mark.parametrize("room", ROOMS, ids=names)
def test_every_room_has_a_tour_whose_files_exist(room: Path) -> None:
    tour = ast.get_docstring(ast.parse(room.read_text()))
    assert tour
    assert missing_files(tour, room.parent) == []


@pytest.mark.parametrize(
    "room",
    [room for room in ROOMS if "In reading order" in room.read_text()],
    ids=names,
)
def test_a_tour_in_reading_order_leaves_no_file_out(room: Path) -> None:
    tour = room.read_text()
    assert [file.name for file in room.parent.glob("[!_]*.py") if file.name not in tour] == []


def test_every_verb_is_in_the_readme() -> None:
    text = README.read_text()
    assert [verb for verb in VERBS if not re.search(rf"\b{verb}\b", text)] == []


def test_the_readme_is_short_and_says_first_what_has_not_been_run() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= LONGEST_README
    assert any("no GPU run has been possible" in line for line in lines[:10])


def test_what_is_wrong_is_seen() -> None:
    assert missing_paths(
        "`distllm/engine/no_such.py`, tests/bench/no*.json, launch/test, conf/model/NAME.yaml"
    ) == [
        "distllm/engine/no_such.py",
        "tests/bench/no*.json",
    ]
    assert missing_links("[a](distllm/no/README.md) [b](https://a.b/c) [c](README.md#top)", ROOT) == [
        "distllm/no/README.md"
    ]
    assert missing_files("loop.py, verbs/train.py and gone.py", PACKAGE / "trainer") == ["gone.py"]
    assert list(
        verbs("distllm is prose; `distllm trian x`\n```\ndistllm: ok\n$ distllm check world_size=1\n```")
    ) == [
        "trian",
        "check",
    ]
