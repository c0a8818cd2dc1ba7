"""Write weights into Hugging Face's files, tensor by tensor, with at most one file in memory.

Either `model.safetensors`, or several files and `model.safetensors.index.json`, which maps tensors to files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from distllm.huggingface.counterpart import Counterpart
from distllm.layout.dtypes import DTYPES

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write_weights(
    folder: Path,
    counterparts: Sequence[Counterpart],
    read: Callable[[Counterpart], Tensor],
    dtype: str,
    max_bytes: int,
) -> None:
    """Write the weights that `read` returns, rounded to `dtype`, in files of at most `max_bytes` each."""
    shapes = {name: shape for c in counterparts for name, shape in c.their_shapes.items()}
    itemsize = DTYPES[dtype].itemsize
    plan = plan_files({name: math.prod(shape) * itemsize for name, shape in shapes.items()}, max_bytes)
    file_of = {name: file for file, names in plan.items() for name in names}
    waiting: dict[str, Tensor] = {}
    for counterpart in counterparts:
        for name, tensor in counterpart.export_tensors(read(counterpart).to(DTYPES[dtype])).items():
            waiting[name] = tensor
            if name == plan[file_of[name]][-1]:
                _write_file(folder / file_of[name], waiting)
                waiting.clear()
    assert not waiting, f"{list(waiting)} are in no file"
    if len(plan) > 1:
        numel = sum(map(math.prod, shapes.values()))
        metadata = {"total_parameters": numel, "total_size": numel * itemsize}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": file_of})


def _write_file(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, file, metadata={"format": "pt"})  # transformers 4 requires the framework
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner may read


def plan_files(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Return {file: tensors}, in order, of at most `max_bytes` each; a larger tensor is alone in a file.

    sizes: {tensor: bytes}.
    """
    files: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not files or filled + size > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    if len(files) == 1:
        return {WEIGHTS: files[0]}
    count = len(files)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": names for i, names in enumerate(files, 1)}


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
