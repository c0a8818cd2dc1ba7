"""Parquet files, whose parts are row groups; of a large row group a few pages are in memory at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distllm.data.sources.tables import Parts, Tables

if TYPE_CHECKING:
    import pyarrow as pa


class Parquet(Tables):
    def schema(self, path: str) -> pa.Schema:
        import pyarrow.parquet as pq

        return pq.read_schema(path)

    def part_sizes(self, path: str) -> list[int]:
        import pyarrow.parquet as pq

        metadata = pq.read_metadata(path)
        return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]

    def parts(self, path: str, text_field: str, start: int | None, stop: int | None) -> Parts:
        import pyarrow.parquet as pq

        from distllm.data.sources.columns import rows_per_batch

        # Pages are read one after the other; by default pyarrow reads the whole column of a row group at
        # once.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as parquet:
            index = parquet.schema_arrow.get_field_index(text_field)
            assert index >= 0, "column_problem() must have rejected other columns"
            for group in range(start or 0, parquet.num_row_groups if stop is None else stop):
                metadata = parquet.metadata.row_group(group)
                columns = (metadata.column(number) for number in range(metadata.num_columns))
                num_bytes = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == text_field)
                batches = parquet.iter_batches(
                    batch_size=rows_per_batch(metadata.num_rows, num_bytes),
                    row_groups=[group],
                    columns=[text_field],
                    use_threads=False,
                )
                yield f"row group {group}", metadata.num_rows, (batch.column(0) for batch in batches)


PARQUET = Parquet()
