"""The documents of a source, in a fixed order: files sorted by path, rows as they stand in the file."""

from __future__ import annotations

import codecs
import glob
import json
import locale
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distllm.config import schema
from distllm.config.problems import UserError, user_error


@dataclass(frozen=True)
class Document:
    """text: always encodable as UTF-8; may be empty. row: counted from 0 within the file `path`."""

    text: str
    path: str
    row: int


def source_files(source: schema.Source) -> list[Path]:
    """Absolute paths of the files that hold the documents, sorted. User errors: none, or only empty ones."""
    if source.source == "stdlib":
        return _standard_library_files()
    assert source.path is not None, f"rules.py must refuse data.source={source.source} without source.path"
    pattern = os.path.expanduser(source.path)
    # A file whose name holds [ or * is meant literally.
    matches = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    files = sorted({Path(match).absolute() for match in matches if os.path.isfile(match)})
    if not files:
        rule = f"the glob must match a file (looked for in {Path.cwd()})"
        fix = "an absolute glob, such as '/data/**/*.txt'"
        if os.path.isdir(pattern):
            rule, fix = (
                "must be a glob of files, not a folder",
                f"data.path='{source.path.rstrip('/')}/**/*.*'",
            )
        raise user_error("data.path", source.path, rule, fix)
    if all(file.stat().st_size == 0 for file in files):
        raise user_error(
            "data.path", source.path, f"all {len(files)} files are empty", "name files with text"
        )
    return files


def read_documents(source: schema.Source, files: list[Path]) -> Iterator[Document]:
    """The documents of `files` (from `source_files`), in order, holding one batch of them in memory.

    User errors: a file that cannot be read, a row that is not JSON, `text_field` missing or not text.
    """
    for file in files:
        for row, text in _READERS[source.source](source, file):
            yield Document(_encodable(text), str(file), row)


def _standard_library_files() -> list[Path]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages"}
    return sorted(f for f in folder.rglob("*.py") if not installed & set(f.relative_to(folder).parts))


def _standard_library_file(source: schema.Source, file: Path) -> Iterator[tuple[int, str]]:
    # A few of the library's own test files are broken on purpose or declare another encoding.
    yield 0, file.read_bytes().decode("utf-8", errors="replace")


def _text_file(source: schema.Source, file: Path) -> Iterator[tuple[int, str]]:
    # Not by datasets' "text" loader (5.2): it opens files in text mode, which turns \r\n and \r into \n.
    try:
        yield 0, file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        rule = f"{file} must be UTF-8; byte {error.start} is not"
        fix = f"convert it (iconv -t UTF-8) or leave it out; see it with: xxd -s {error.start} -l 16 '{file}'"
        raise user_error("data.path", source.path, rule, fix) from error
    except OSError as error:
        raise _unreadable(source, file, error) from error


def _json_lines(source: schema.Source, file: Path) -> Iterator[tuple[int, str]]:
    # datasets reads the lines (and unpacks .gz, .zst, .xz), but each is parsed here: its "json" loader (5.2)
    # guesses types, so that the text "2020-01-01" becomes a time, and never names the line that is broken.
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        # datasets (5.2) decodes packed files by the locale, whatever encoding it is told.
        raise user_error("data.source", "jsonl", "needs a UTF-8 locale", "export PYTHONUTF8=1")
    for row, line in enumerate(_column(source, file, "text", "text")):
        line = line.removeprefix("\ufeff")  # a byte order mark
        if line.strip():
            place = f"line {row + 1} of {file}"
            fields = _json_object(source, place, line)
            if source.text_field not in fields:
                raise _missing_field(source, place, list(fields))
            yield row, _text(source, place, fields[source.text_field])


def _json_object(source: schema.Source, place: str, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        rule = f"every line must be one JSON object; {place}: {error.msg} at column {error.colno}"
        raise user_error("data.path", source.path, rule, "repair or drop the line") from error
    if not isinstance(fields, dict):
        rule = f"every line must be one JSON object; {place} is a {type(fields).__name__}"
        raise user_error("data.path", source.path, rule, 'write {"text": ...} on every line')
    return fields


def _parquet_rows(source: schema.Source, file: Path) -> Iterator[tuple[int, str]]:
    texts = _column(source, file, "parquet", source.text_field, columns=[source.text_field])
    for row, text in enumerate(texts):
        yield row, _text(source, f"row {row + 1} of {file}", text)


_READERS = {
    "stdlib": _standard_library_file,
    "text": _text_file,
    "jsonl": _json_lines,
    "parquet": _parquet_rows,
}


def _column(source: schema.Source, file: Path, loader: str, column: str, **options: Any) -> Iterator[Any]:
    """One column of a file, read by the `datasets` library without network, in small batches."""
    import datasets  # seconds; not needed for the other sources

    # The file goes by a plain name and with its own cache folder. By its real name datasets (5.2) reads
    # [, *, # and :: as patterns or chained addresses and yields no row at all without a word; in the shared
    # cache (~/.cache/huggingface) it would leave one lock file for every file ever read.
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"rows{file.suffix if file.suffix[1:].isalnum() else ''}")
        link.symlink_to(file)
        common: dict[str, Any] = {"data_files": [str(link)], "cache_dir": folder, "split": "train"}
        common["streaming"] = True  # without it every row is first copied into the cache
        try:
            if loader == "parquet":
                columns = datasets.load_dataset(loader, **common).column_names
                if column not in columns:
                    raise _missing_field(source, str(file), columns)
            for row in datasets.load_dataset(loader, **common, **options):
                yield row[column]
        except UserError:
            raise
        except Exception as error:
            # datasets passes on what pyarrow, fsspec and the decompressors raise, each of another kind.
            raise _unreadable(source, file, error) from error


def _text(source: schema.Source, place: str, value: object) -> str:
    """An absent text (null) is an empty document; any other kind is an error."""
    if value is None:
        return ""
    if not isinstance(value, str):
        rule = f"must hold text; {place} holds a {type(value).__name__}"
        raise user_error("data.text_field", source.text_field, rule, "name the field with the text")
    return value


def _encodable(text: str) -> str:
    """JSON can hold halves of UTF-16 pairs, which no tokenizer takes: each becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", errors="surrogatepass").decode("utf-16-le", errors="replace")
    return text


def _missing_field(source: schema.Source, place: str, fields: list[str]) -> UserError:
    rule = f"must be a field of every row; {place} has {fields}"
    return user_error("data.text_field", source.text_field, rule, "data.text_field=NAME with one of these")


def _unreadable(source: schema.Source, file: Path, error: Exception) -> UserError:
    rule = f"{file} must be readable ({type(error).__name__}: {error})"
    return user_error("data.path", source.path, rule, "repair the file, or leave it out of data.path")
