"""Lines on a disk that does not take them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distllm.metrics import jsonl
from distllm.metrics.jsonl import PatientLines

# A limit on the size of files stops a write in its middle, as a disk with a few bytes left does.
ALMOST_FULL = """
import resource, signal, sys
from pathlib import Path
from distllm.metrics.jsonl import append_line
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
append_line(path, {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
try:
    append_line(path, {"step": 2})
except OSError as error:
    print(error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
append_line(path, {"step": 3})
"""


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    result = subprocess.run(
        [sys.executable, "-c", ALMOST_FULL, str(path)], capture_output=True, text=True, check=True
    )
    assert result.stdout == "28\n"
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_rows_wait_until_the_disk_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, warnings = tmp_path / "rows.jsonl", list[str]()
    append_line, is_full = jsonl.append_line, True

    def append(*arguments: object) -> None:
        if is_full:
            raise OSError(28, "No space left on device")
        append_line(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(jsonl, "append_line", append)
    lines = PatientLines(path, warnings.append)
    for step in (1, 2):
        lines.append({"step": step})
    assert not path.exists()
    (warning,) = warnings
    assert "rows of rows.jsonl are kept in memory" in warning
    with pytest.raises(OSError, match="No space left"):
        lines.flush()
    is_full = False
    lines.append({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
