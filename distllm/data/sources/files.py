"""The files of a source, sorted by path."""

from __future__ import annotations

import glob
import os
import sysconfig
from pathlib import Path

from distllm.config.data_schema import Source
from distllm.config.problems import user_error
from distllm.data.sources.documents import InputFile
from distllm.data.sources.huggingface import list_shards


def list_files(source: Source) -> list[InputFile]:
    """The files that hold the documents, sorted by path; of `megatron`, the one .bin.

    User errors: no file matches, or only empty ones; a data set, subset or split that is not there.
    """
    if source.source == "stdlib":
        return [input_file(path) for path in _standard_library_paths()]
    if source.source == "huggingface":
        return list_shards(source)
    assert source.path is not None, f"rules.py must refuse data.source={source.source} without source.path"
    paths = _matching_paths(source.path)
    if source.source == "megatron":
        paths = [_token_file(source.path, paths)]
    files = [input_file(path) for path in paths]
    if not any(file.num_bytes for file in files):
        rule, fix = f"all {len(files)} files are empty", "name files with text"
        raise user_error("data.path", source.path, rule, fix)
    return files


def input_file(path: Path) -> InputFile:
    status = path.stat()
    return InputFile(str(path), status.st_size, status.st_mtime_ns)


def _matching_paths(path: str) -> list[Path]:
    """Absolute and sorted. User error: there is none."""
    pattern = os.path.expanduser(path)
    # A file whose name holds [ or * is meant literally.
    matches = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    paths = sorted({Path(match).absolute() for match in matches if os.path.isfile(match)})
    if not paths:
        rule = f"the glob must match a file (looked for in {Path.cwd()})"
        fix = "an absolute glob, such as '/data/**/*.txt'"
        if os.path.isdir(pattern):
            rule, fix = "must be a glob of files, not a folder", f"data.path='{path.rstrip('/')}/**/*.*'"
        raise user_error("data.path", path, rule, fix)
    return paths


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


def _standard_library_paths() -> list[Path]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages"}
    return sorted(f for f in folder.rglob("*.py") if not installed & set(f.relative_to(folder).parts))
