"""Files that a glob names, sorted by path."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from distllm.config.problems import user_error
from distllm.data.sources.documents import InputFile


def is_matched(path: str) -> bool:
    """Return whether any file matches; stops at the first."""
    pattern = os.path.expanduser(path)
    if os.path.isfile(pattern):
        return True
    return any(os.path.isfile(file) for file in glob.iglob(pattern, recursive=True))


def matching_paths(path: str) -> list[Path]:
    """Return the matching paths, absolute and sorted. User error: there is none."""
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


def files_of(path: str, paths: list[Path]) -> list[InputFile]:
    """Return size and time of the files `paths` that the glob `path` matches. User error: all are empty."""
    files = [input_file(file) for file in paths]
    if not any(file.num_bytes for file in files):
        rule, fix = f"all {len(files)} files are empty", "name files with text"
        raise user_error("data.path", path, rule, fix)
    return files


def input_file(path: Path) -> InputFile:
    status = path.stat()
    return InputFile(str(path), status.st_size, status.st_mtime_ns)


def has_changed(file: InputFile) -> bool:
    """Return whether the file has changed since it was listed; a removed file has changed."""
    try:
        return input_file(Path(file.path)) != file
    except OSError:
        return True
