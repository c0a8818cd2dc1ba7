"""Arrow files and streams, whose parts are record batches; a stream is one part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from distllm.data.sources.tables import Parts, Tables

if TYPE_CHECKING:
    import pyarrow as pa

FILE_MAGIC = b"ARROW1"


class Arrow(Tables):
    def schema(self, path: str) -> pa.Schema:
        import pyarrow as pa

        with pa.OSFile(path) as stream:
            return _open(stream).schema

    def part_sizes(self, path: str) -> list[int]:
        import pyarrow as pa

        with pa.OSFile(path) as stream:
            reader = _open(stream)
            # The batches of a stream are known only after reading all of it.
            return [1] * reader.num_record_batches if isinstance(reader, pa.RecordBatchFileReader) else []

    def parts(self, path: str, text_field: str, start: int | None, stop: int | None) -> Parts:
        import pyarrow as pa

        # Not mapped into memory: an I/O error there would kill the process.
        with pa.OSFile(path) as stream:
            index = _open(stream).schema.get_field_index(text_field)
            stream.seek(0)
            reader = _open(stream, pa.ipc.IpcReadOptions(included_fields=[index], use_threads=False))
            if isinstance(reader, pa.RecordBatchFileReader):
                for number in range(start or 0, reader.num_record_batches if stop is None else stop):
                    yield f"record batch {number}", None, _record_batch(reader, number)
            else:
                yield "stream of record batches", None, (batch.column(0) for batch in reader)


def _record_batch(reader: pa.RecordBatchFileReader, number: int) -> Iterator[pa.Array]:
    yield reader.get_batch(number).column(0)


def _open(
    stream: pa.NativeFile, options: pa.ipc.IpcReadOptions | None = None
) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    import pyarrow as pa

    is_file = stream.read(len(FILE_MAGIC)) == FILE_MAGIC
    stream.seek(0)
    return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(stream, options=options)


ARROW = Arrow()
