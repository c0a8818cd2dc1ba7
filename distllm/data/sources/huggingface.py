"""Data sets of the `datasets` library: of the hub (streamed), folders of data files, and saved ones.

The library gives up the rest of a shard at its first broken row; JSON lines on disk are better read by
data.source=jsonl. It also guesses types: the text "2020-01-01" of a JSON file becomes a time. Of Parquet it
holds a whole row group in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from distllm.config.data_schema import Source
from distllm.config.problems import Problem, UserError, user_error
from distllm.data.sources import huggingface_splits
from distllm.data.sources.documents import InputFile, Rejected, Rows, Unit, unreadable
from distllm.data.sources.ranges import Range, even_ranges
from distllm.data.sources.source_kind import SourceKind

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 128


class HuggingFace(SourceKind):
    def problems(self, place: str, source: Source) -> Iterator[Problem]:
        if not source.path:
            rule = f"is required for {place}.source={source.source}"
            fix = f"{place}.path=NAME of a data set, or a local folder"
            yield Problem(f"{place}.path", source.path, rule, fix)

    def environment_problems(self, place: str, source: Source) -> Iterator[Problem]:
        """Find no problems: asking the library or the hub takes seconds, so `list_files` reports them."""
        yield from ()

    def list_files(self, source: Source) -> list[InputFile]:
        """List the data files of a split, each a shard, in the library's order; a saved data set is one file.

        User errors: a data set, subset, split or column that does not exist; the hub cannot be reached.
        """
        huggingface_splits.open_split.cache_clear()  # it may have changed since
        dataset, files = huggingface_splits.open_split(source)
        _check_column(source, dataset)
        return files

    def ranges(self, source: Source, file: InputFile, unit_bytes: int) -> Iterator[Range]:
        """Cut a saved data set between any two rows; no other can be cut."""
        if _is_saved(source):
            num_rows = len(huggingface_splits.open_split(source)[0])
            yield from even_ranges(num_rows, file.num_bytes, unit_bytes)

    def changed_file(self, source: Source, files: list[InputFile]) -> InputFile | None:
        """List the files again and compare: a shard's path is not one of this machine."""
        if all(file.modified_ns is None for file in files):
            return None  # of the hub, whose addresses hold the commit
        present_files = self.list_files(source)
        return next((file for file in files if file not in present_files), None)

    def read(
        self, source: Source, files: list[InputFile], file: int, unit: Unit, max_document_bytes: int | None
    ) -> Rows:
        """Read rows. User errors: the data set changed since its files were listed; the hub is down."""
        import pyarrow as pa

        from distllm.data.sources.columns import column_problem, decoded_document, encoded_texts

        row = 0
        try:
            dataset, present_files = huggingface_splits.open_split(source)
            if len(present_files) != len(files) or present_files[file] != files[file]:
                rule = f"must not change while it is read; {files[file].path} has"
                raise user_error("data.path", source.path, rule, "start again")
            for table in _tables(source, dataset, file, len(files), unit):
                problem = column_problem(table.schema, source.text_field)
                if problem:
                    yield Rejected(file, None, *problem)
                    break
                for column in table.column(source.text_field).chunks:
                    for encoded in encoded_texts(column):
                        yield decoded_document(encoded, file, row, max_document_bytes)
                        row += 1
        except UserError:
            raise
        except Exception as error:
            # The library passes on errors of pyarrow, fsspec and the decompressors, which share no type.
            is_of_the_data = isinstance(error, ValueError | pa.ArrowException)
            if huggingface_splits.local_folder(source) is None and not is_of_the_data:
                # The network failed, not the data: rows left out now would be missing for good.
                raise huggingface_splits.unreachable(source, error) from error
            yield unreadable(file, error, f"after row {row}")
        return row


def _is_saved(source: Source) -> bool:
    folder = huggingface_splits.local_folder(source)
    return folder is not None and huggingface_splits.is_saved(folder)


def _tables(source: Source, dataset: Any, file: int, num_files: int, unit: Unit) -> Iterator[pa.Table]:
    dataset = dataset.select_columns([source.text_field]).with_format("arrow")
    if not _is_saved(source):
        yield from dataset.shard(num_shards=num_files, index=file).iter(BATCH_ROWS)
        return
    stop = len(dataset) if unit.stop is None else unit.stop
    for first in range(unit.start or 0, stop, BATCH_ROWS):
        yield dataset[first : min(first + BATCH_ROWS, stop)]


def _check_column(source: Source, dataset: Any) -> None:
    from distllm.data.sources.columns import column_problem

    schema = dataset.features.arrow_schema if dataset.features else None
    if schema is None:
        try:
            first = next(iter(dataset.with_format("arrow").iter(1)), None)
        except Exception:  # reading meets it again, and reports the place
            return
        schema = first.schema if first is not None else None
    problem = column_problem(schema, source.text_field) if schema is not None else None
    if problem:
        fix = "data.text_field=NAME with the column of the text"
        raise user_error("data.text_field", source.text_field, f"must be a column of text; {problem[1]}", fix)


HUGGINGFACE = HuggingFace()
