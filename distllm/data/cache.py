"""Folders that are built once, by one process while the others wait, and are visible only when complete."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from distllm.config.problems import user_error

MANIFEST = "manifest.json"


def build_once(
    folder: Path, build: Callable[[Path], dict[str, Any]], report: Callable[[str], None]
) -> dict[str, Any]:
    """Return the manifest of `folder`; if the folder does not exist yet, `build` fills and describes it.

    build: gets an empty folder beside `folder`; what it returns becomes manifest.json. Only then is the
        folder renamed to its final name, so a killed process leaves nothing that a later one takes for a
        result.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        create_cache(folder.parent)
        with lock(folder.with_name(f"{folder.name}.lock"), report):
            if not manifest.exists():
                _build(folder, build)
    return json.loads(manifest.read_text())


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    # The lock excludes every other builder, so anything found here was left by a killed process. The host is
    # in the name because some cluster file systems (Lustre with localflock) lock within one machine only.
    unfinished = folder.with_name(f"{folder.name}.{socket.gethostname()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        try:
            content = build(unfinished)
        except OSError:
            # Another machine without our lock was faster, and has removed what we were reading.
            if (folder / MANIFEST).exists():
                return
            raise
        (unfinished / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")
        for file in unfinished.iterdir():
            to_disk(file)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another machine without our lock was faster; its result is the same.
            if not (folder / MANIFEST).exists():
                raise
        to_disk(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def digest(content: bytes) -> str:
    """Return a hash of `content` as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(content)


def create_cache(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"must be a folder that can be created ({error.strerror})"
        raise user_error(
            "data.cache", cache, rule, "data.cache=FOLDER in a place where you may write"
        ) from error


@contextmanager
def lock(file: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock that one process has at a time; the kernel frees it when that process ends, however it
    ends.

    The file stays: if it were removed, two processes could hold locks on two files of this name.
    """
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that prepares {file.stem}")
            fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError as error:
            rule = f"must be on a file system with file locks ({error.strerror})"
            raise user_error("data.cache", file.parent, rule, "data.cache=FOLDER on a local disk") from error
        yield


def to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
