"""Open a split of a Hugging Face data set; for a wrong name, the error lists the names that exist."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from distllm.config.data_schema import Source
from distllm.config.problems import UserError, user_error
from distllm.data.sources.documents import InputFile


def local_folder(source: Source) -> Path | None:
    assert source.path is not None, "rules.py must refuse data.source=huggingface without source.path"
    path = os.path.expanduser(source.path)
    return Path(path).absolute() if os.path.isdir(path) else None


def is_saved(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _saved_file(name: str, folder: Path) -> InputFile:
    statuses = [file.stat() for file in folder.iterdir() if file.suffix in (".arrow", ".json")]
    num_bytes = sum(status.st_size for status in statuses)
    return InputFile(name, num_bytes, max(status.st_mtime_ns for status in statuses))


def _shard_file(name: str, data_file: str) -> InputFile:
    if os.path.isfile(data_file):
        status = os.stat(data_file)
        return InputFile(f"{name} {data_file}", status.st_size, status.st_mtime_ns)
    return InputFile(f"{name} {data_file}", 0, None)  # of the hub; its address holds the commit


@functools.lru_cache(maxsize=1)  # to ask the hub takes seconds, and there are many units
def open_split(source: Source) -> tuple[Any, list[InputFile]]:
    """Return the split and its files; after `Dataset.save_to_disk` one file stands for the folder.

    User errors: a data set, subset or split that does not exist; the hub cannot be reached.
    """
    folder = local_folder(source)
    name = f"{folder or source.path}{f'/{source.subset}' if source.subset else ''}:{source.split}"
    if folder and is_saved(folder):
        is_one_of_splits = (folder / "dataset_dict.json").is_file()
        dataset = _open_saved(source, folder)
        return dataset, [_saved_file(name, folder / source.split if is_one_of_splits else folder)]
    dataset, data_files = _open_streamed(source, folder)
    if len(data_files) != dataset.num_shards:  # archives, for example
        data_files = [f"shard {shard} of {dataset.num_shards}" for shard in range(dataset.num_shards)]
    return dataset, [_shard_file(name, data_file) for data_file in data_files]


def _open_saved(source: Source, folder: Path) -> Any:
    import datasets  # takes seconds; the other sources do not need it

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
    """Return the split and its data files."""
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
    except (ValueError, RuntimeError) as error:  # RuntimeError: the data set is a script
        if "onfig" not in str(error):
            rule = f"must be a data set of the datasets library ({error})"
            raise user_error("data.path", source.path, rule, "another data.path") from error
        raise user_error("data.subset", source.subset, str(error), "data.subset=NAME of these") from error
    except Exception as error:  # of the hub's client, many kinds
        raise unreachable(source, error) from error
    try:
        dataset = builder.as_streaming_dataset(split=source.split)
    except ValueError as error:
        raise _no_such_split(source, [str(name) for name in builder.config.data_files or []]) from error
    except Exception as error:
        raise unreachable(source, error) from error
    files = builder.config.data_files
    return dataset, [str(file) for file in files[source.split]] if files else []


def _check_names(source: Source, folder: Path) -> None:
    # datasets (5.2) takes :: for a chain of addresses and silently skips such a file.
    if chained := [str(path) for path in folder.rglob("*::*") if path.is_file()]:
        rule = f"the datasets library passes over files with '::' in their names, such as {chained[0]}"
        raise user_error("data.path", source.path, rule, "rename them")


def _no_such_split(source: Source, splits: list[str]) -> UserError:
    rule = f"must be a split of {source.path}, which has {json.dumps(splits)}"
    return user_error("data.split", source.split, rule, "data.split=NAME of these")


def unreachable(source: Source, error: Exception) -> UserError:
    rule = f"must be a local folder, or the hub must be reachable ({type(error).__name__}: {error})"
    fix = "check the network, HF_HUB_OFFLINE and HF_ENDPOINT, or copy the data set to a folder and name that"
    return user_error("data.path", source.path, rule, fix)
