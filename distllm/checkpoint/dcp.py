"""The file format of `torch.distributed.checkpoint` (DCP), torch 2.11 to 2.13: plain PyTorch reads it.

A module's folder holds DCP's `.metadata`: global shapes, boxes, and for each box where its bytes lie in one
of the shards. Only the format is DCP's: its planners gather the list of all pieces on one rank, its reader
loads a whole piece for every box requested from it, and its load ignores holes and casts silently.
"""

from __future__ import annotations

import math
import mmap
import pickle
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from distllm.checkpoint.pieces import Piece
from distllm.layout.place import Box, Shape

METADATA = ".metadata"
Buffer = bytearray | mmap.mmap


class Writer(Protocol):
    """A file that is written sequentially."""

    def write(self, data: Any) -> int: ...

    def tell(self) -> int: ...

    def flush(self) -> None: ...


@dataclass(frozen=True)
class Record:
    """The place of one written piece: `length` bytes of `file` from `offset`."""

    state: str
    name: str
    global_shape: Shape
    dtype: torch.dtype
    box: Box
    file: str
    offset: int
    length: int


def write_pieces(stream: Writer, file: str, pieces: Iterable[Piece]) -> list[Record]:
    """Append each piece to `stream`; the records name this file `file`."""
    records = []
    for piece in pieces:
        offset = stream.tell()
        torch.save(_alone(piece.view), stream)  # type: ignore[arg-type]  # it only writes
        length = stream.tell() - offset
        records.append(
            Record(
                piece.state, piece.name, piece.global_shape, piece.view.dtype, piece.box, file, offset, length
            )
        )
    return records


def write_metadata(stream: Writer, records: Sequence[Record]) -> None:
    """Write DCP's description of one module from all ranks' records, which must cover each tensor once."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for record in records:
        key = f"{record.state}/{record.name}"
        tensor = tensors.get(key) or TensorStorageMetadata(
            TensorProperties(dtype=record.dtype), torch.Size(record.global_shape), []
        )
        tensors[key] = tensor
        index = MetadataIndex(key, record.box.offsets, index=len(tensor.chunks))
        assert index not in places, f"{key} was written twice at {record.box.offsets}"
        places[index] = _StorageInfo(record.file, record.offset, record.length)
        tensor.chunks.append(_chunk(record.box))
    for key, tensor in tensors.items():
        written = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
        assert written == math.prod(tensor.size), f"{written} of {math.prod(tensor.size)} elements of {key}"
    pickle.dump(Metadata(tensors, storage_data=places, version=CURRENT_DCP_VERSION), stream)  # type: ignore[arg-type]


def read_metadata(stream: BinaryIO) -> Metadata:
    metadata: Metadata = pickle.load(stream)
    return metadata


def read_pieces(metadata: Metadata, pieces: Sequence[Piece], shard: Callable[[str], Buffer]) -> None:
    """Fill the pieces of one module in place, or fail if the file does not hold every element of them.

    shard: name of a file, as in the metadata -> its content.
    """
    for piece in pieces:
        stored = metadata.state_dict_metadata.get(piece.key)
        assert isinstance(stored, TensorStorageMetadata), f"{piece.key} is not in the checkpoint"
        assert tuple(stored.size) == piece.global_shape, f"{piece.key} is {tuple(stored.size)} there"
        num_read = 0
        for item in create_read_items_for_chunk_list(piece.key, stored, [_chunk(piece.box)]):
            info: _StorageInfo = metadata.storage_data[item.storage_index]
            assert item.storage_index.index is not None, "the reads of DCP say which chunk they come from"
            sizes = stored.chunks[item.storage_index.index].sizes
            source = _saved_tensor(shard(info.relative_path), info, stored.properties.dtype, sizes)
            target = narrow_tensor_by_index(piece.view, item.dest_offsets, item.lengths)
            target.copy_(narrow_tensor_by_index(source, item.storage_offsets, item.lengths))
            num_read += math.prod(item.lengths)
        assert num_read == piece.box.numel, f"the checkpoint does not cover {piece.key}"


def _saved_tensor(content: Buffer, info: _StorageInfo, dtype: torch.dtype, sizes: Sequence[int]) -> Tensor:
    """Return the tensor that `torch.save` wrote, as a view of `content`: only used elements are read."""
    archive = zipfile.ZipFile(_Part(content, info.offset, info.length))
    entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
    # A local header of 30 bytes, a name and an extra field whose lengths it ends with, then the bytes.
    header = info.offset + entry.header_offset
    name_length = int.from_bytes(content[header + 26 : header + 28], "little")
    extra_length = int.from_bytes(content[header + 28 : header + 30], "little")
    numel = math.prod(sizes)
    assert entry.file_size == numel * dtype.itemsize, "a piece of another size than its metadata says"
    begin = header + 30 + name_length + extra_length
    return torch.frombuffer(content, dtype=dtype, count=numel, offset=begin).view(*sizes)


class _Part:
    """A part of a buffer, as a file for `zipfile`."""

    def __init__(self, content: Buffer, begin: int, length: int) -> None:
        self._content, self._begin, self._length, self._position = content, begin, length, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = (0, self._position, self._length)[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = self._length - self._position
        size = left if size < 0 else min(size, left)
        begin = self._begin + self._position
        self._position += size
        return bytes(self._content[begin : begin + size])


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def _alone(view: Tensor) -> Tensor:
    """Return the tensor in host memory, with a storage of its own: `torch.save` writes whole storages.

    A tensor that is there already is not copied: that would take longer than the write.
    """
    tensor = view.detach().cpu().contiguous()
    begin = tensor.storage_offset() * tensor.element_size()
    own = tensor.untyped_storage()[begin : begin + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(own, 0, tensor.shape, tensor.stride())
