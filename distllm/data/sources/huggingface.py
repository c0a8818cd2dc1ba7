"""Data sets of the `datasets` library: of the hub (streamed), folders of data files, and saved ones.

The library gives up the rest of a shard at its first broken row; JSON lines on disk are better read by
data.source=jsonl. It also guesses types: the text "2020-01-01" of a JSON file becomes a time.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from distllm.config.data_schema import Source
from distllm.config.problems import UserError, user_error
from distllm.data.sources.documents import InputFile, Rejected, Rows, unreadable
from distllm.data.sources.tables import column_problem, decoded_document, encoded_texts

BATCH_ROWS = 128


def list_shards(source: Source) -> list[InputFile]:
    """The data files of a split, each a shard, in the library's order; a saved data set is one file.

    User errors: data set, subset, split or column that is not there; the hub cannot be reached.
    """
    _open.cache_clear()  # it may have changed since
    folder = _local_folder(source)
    dataset, data_files = _open(source)
    _check_column(source, dataset)
    name = f"{folder or source.path}{f'/{source.subset}' if source.subset else ''}:{source.split}"
    if folder and is_saved(folder):
        sizes = [file.stat().st_size for file in folder.rglob("*.arrow")]
        return [InputFile(name, sum(sizes), max(f.stat().st_mtime_ns for f in folder.rglob("*.json")))]
    if len(data_files) != dataset.num_shards:  # archives, for example
        data_files = [f"shard {shard} of {dataset.num_shards}" for shard in range(dataset.num_shards)]
    return [_shard_file(name, data_file) for data_file in data_files]


def num_rows(source: Source) -> int | None:
    """Of a saved data set, which can be cut into ranges of rows; None of any other."""
    folder = _local_folder(source)
    return len(_open(source)[0]) if folder and is_saved(folder) else None


def read_shard(
    source: Source, file: int, num_files: int, start: int | None, stop: int | None, limit: int | None
) -> Rows:
    """The rows of shard `file` of `num_files`, or [start, stop) of a saved data set. limit: bytes of text."""
    row = 0
    try:
        dataset, _ = _open(source)
        for table in _tables(source, dataset, file, num_files, start, stop):
            problem = column_problem(table.schema, source.text_field)
            if problem:
                yield Rejected(file, None, *problem)
                break
            for column in table.column(source.text_field).chunks:
                for encoded in encoded_texts(column):
                    yield decoded_document(encoded, file, row, limit)
                    row += 1
    except UserError:
        raise
    except Exception as error:
        # The library passes on what pyarrow, fsspec and the decompressors raise, each of another kind.
        if _local_folder(source) is None and not isinstance(error, ValueError | pa.ArrowException):
            # The net is at fault, not the data: what is left out now would be missing for good.
            raise _unreachable(source, error) from error
        yield unreadable(file, error, f"after row {row}")
    return row


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _tables(
    source: Source, dataset: Any, file: int, num_files: int, start: int | None, stop: int | None
) -> Iterator[pa.Table]:
    folder = _local_folder(source)
    dataset = dataset.select_columns([source.text_field]).with_format("arrow")
    if folder is None or not is_saved(folder):
        yield from dataset.shard(num_shards=num_files, index=file).iter(BATCH_ROWS)
        return
    stop = len(dataset) if stop is None else stop
    for first in range(start or 0, stop, BATCH_ROWS):
        yield dataset[first : min(first + BATCH_ROWS, stop)]


def _local_folder(source: Source) -> Path | None:
    assert source.path is not None, "rules.py must refuse data.source=huggingface without source.path"
    path = os.path.expanduser(source.path)
    return Path(path).absolute() if os.path.isdir(path) else None


def _shard_file(name: str, data_file: str) -> InputFile:
    if os.path.isfile(data_file):
        status = os.stat(data_file)
        return InputFile(f"{name} {data_file}", status.st_size, status.st_mtime_ns)
    return InputFile(f"{name} {data_file}", 0, None)  # of the hub; its address holds the commit


@functools.lru_cache(maxsize=1)  # to ask the hub takes seconds, and there are many units
def _open(source: Source) -> tuple[Any, list[str]]:
    """The split and, where it is streamed, its data files."""
    folder = _local_folder(source)
    return (
        (_open_saved(source, folder), []) if folder and is_saved(folder) else _open_streamed(source, folder)
    )


def _open_saved(source: Source, folder: Path) -> Any:
    import datasets  # seconds; not needed for the other sources

    if source.subset is not None:
        raise user_error("data.subset", source.subset, "a saved data set has no subsets", "data.subset=null")
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # of pyarrow, json or the file system
        rule = f"must be readable ({type(error).__name__}: {error})"
        raise user_error("data.path", source.path, rule, "repair the folder, or save it again") from error
    if isinstance(saved, datasets.DatasetDict):
        if source.split not in saved:
            raise _no_such_split(source, list(saved))
        return saved[source.split]
    if source.split not in ("train", str(saved.split)):
        raise _no_such_split(source, ["train"])
    return saved


def _open_streamed(source: Source, folder: Path | None) -> tuple[Any, list[str]]:
    import datasets

    if folder:
        _check_names(source, folder)
    try:
        # A cache of its own: in the shared one (~/.cache/huggingface) it would leave a lock file.
        with tempfile.TemporaryDirectory() as cache:
            builder = datasets.load_dataset_builder(
                str(folder or source.path), source.subset, cache_dir=cache
            )
    except FileNotFoundError as error:  # of datasets, with a message of its own
        rule = f"must be a data set on the hub, or a folder of data files ({error})"
        fix = "data.path=OWNER/NAME or data.path=FOLDER; log in first if it is private: hf auth login"
        raise user_error("data.path", source.path, rule, fix) from error
    except ValueError as error:
        if "onfig" not in str(error):
            rule = f"must be a data set of the datasets library ({error})"
            raise user_error("data.path", source.path, rule, "another data.path") from error
        raise user_error("data.subset", source.subset, str(error), "data.subset=NAME of these") from error
    except Exception as error:  # of the hub's client, many kinds
        raise _unreachable(source, error) from error
    try:
        dataset = builder.as_streaming_dataset(split=source.split)
    except ValueError as error:
        raise _no_such_split(source, [str(name) for name in builder.config.data_files or []]) from error
    except Exception as error:
        raise _unreachable(source, error) from error
    files = builder.config.data_files
    return dataset, [str(file) for file in files[source.split]] if files else []


def _check_column(source: Source, dataset: Any) -> None:
    schema = dataset.features.arrow_schema if dataset.features else None
    if schema is None:
        try:
            first = next(iter(dataset.with_format("arrow").iter(1)), None)
        except Exception:  # reading will meet it again, and tell the place
            return
        schema = first.schema if first is not None else None
    problem = column_problem(schema, source.text_field) if schema is not None else None
    if problem:
        fix = "data.text_field=NAME with the column of the text"
        raise user_error("data.text_field", source.text_field, f"must be a column of text; {problem[1]}", fix)


def _check_names(source: Source, folder: Path) -> None:
    # datasets (5.2) takes :: for a chain of addresses and passes over such a file without a word.
    if chained := [str(path) for path in folder.rglob("*::*") if path.is_file()]:
        rule = f"the datasets library passes over files with '::' in their names, such as {chained[0]}"
        raise user_error("data.path", source.path, rule, "rename them")


def _no_such_split(source: Source, splits: list[str]) -> UserError:
    rule = f"must be a split of {source.path}, which has {json.dumps(splits)}"
    return user_error("data.split", source.split, rule, "data.split=NAME of these")


def _unreachable(source: Source, error: Exception) -> UserError:
    rule = f"must be a local folder, or the hub must be reachable ({type(error).__name__}: {error})"
    fix = "check the network, HF_HUB_OFFLINE and HF_ENDPOINT, or copy the data set to a folder and name that"
    return user_error("data.path", source.path, rule, fix)
