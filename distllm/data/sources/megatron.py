"""A pair of token files, .bin and .idx, that another tool made.

`preparation/megatron_pair.py` checks the pair; nothing is read here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distllm.config.data_schema import Source
from distllm.config.problems import user_error
from distllm.data.sources.documents import InputFile
from distllm.data.sources.files import files_of, matching_paths
from distllm.data.sources.source_kind import SourceKind, required_path


class Megatron(SourceKind):
    is_tokenized = True

    def list_files(self, source: Source) -> list[InputFile]:
        """Return the one .bin. User errors: none, several, or one that is empty or lacks its index."""
        path = required_path(source)
        return files_of(path, [_token_file(path, matching_paths(path))])

    def identity(self, source: Source) -> dict[str, Any]:
        return {}


def _token_file(path: str, paths: list[Path]) -> Path:
    token_files = [path for path in paths if path.suffix == ".bin"]
    if len(token_files) != 1:
        rule = f"must match one .bin file of tokens; it matches {[file.name for file in token_files][:5]}"
        raise user_error("data.path", path, rule, "data.path=FOLDER/NAME.bin; several make a mixture")
    index = token_files[0].with_suffix(".idx")
    if not index.is_file():
        rule = f"needs its index beside it, {index}"
        raise user_error("data.path", path, rule, "copy the .idx that was written with the .bin")
    return token_files[0]


MEGATRON = Megatron()
