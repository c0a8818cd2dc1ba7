"""Read weights from Hugging Face's files; every tensor must be there, with its shape, and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from distllm.config.problems import Problem, UserError, user_error
from distllm.huggingface.config import form_of
from distllm.huggingface.counterpart import Counterpart
from distllm.huggingface.write import INDEX, WEIGHTS
from distllm.layout.place import Shape

# The types whose values fp32 holds exactly, as safetensors calls them.
EXACT_TYPES = ("F32", "BF16", "F16")
# Buffers that earlier versions of transformers stored with the weights: rotary frequencies and causal masks.
CONSTANTS = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")
MOST_NAMES_SHOWN = 5
WHOLE_MODEL = "name the folder of a whole model, as Hugging Face's save_pretrained writes it"


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file. name: within the file. type: as safetensors calls it."""

    file: Path
    name: str
    shape: Shape
    type: str

    def load(self) -> Tensor:
        with safe_open(self.file, framework="pt") as held:
            tensor: Tensor = held.get_tensor(self.name)
            return tensor


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of an imported folder. User errors: no such file, or another kind of content."""
    try:
        content = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        rule = f"must hold a readable {name} ({error})"
        raise user_error("import.path", folder, rule, WHOLE_MODEL) from error
    if not isinstance(content, dict):
        raise user_error("import.path", folder, f"{name} must hold a JSON object", WHOLE_MODEL)
    return content


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Find every tensor of a folder. User errors: no safetensors, a file that is missing or damaged."""
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            rule = f"must hold {WEIGHTS} or {INDEX}"
            fix = "load the model with transformers and write it with save_pretrained(FOLDER)"
            raise user_error("import.path", folder, rule, fix)
        return _tensors_of_file(folder, WEIGHTS)
    file_of = read_json(folder, INDEX).get("weight_map")
    if not isinstance(file_of, dict):
        raise user_error("import.path", folder, f"{INDEX} must hold a weight_map", WHOLE_MODEL)
    tensors: dict[str, Stored] = {}
    for file in sorted(set(file_of.values())):
        held = _tensors_of_file(folder, file)
        tensors |= {name: stored for name, stored in held.items() if file_of.get(name, file) == file}
    return tensors


def _tensors_of_file(folder: Path, file: str) -> dict[str, Stored]:
    path = folder / file
    try:
        with safe_open(path, framework="pt") as held:
            slices = {name: held.get_slice(name) for name in held.keys()}  # noqa: SIM118  # no dictionary
            return {
                name: Stored(path, name, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        rule = f"must hold a whole {file} ({error})"
        raise user_error("import.path", folder, rule, WHOLE_MODEL) from error


def match_tensors(
    folder: Path, stored: Mapping[str, Stored], counterparts: Sequence[Counterpart]
) -> dict[str, Stored]:
    """Return the stored tensors by the names of `counterparts`; a user error lists all that do not fit."""
    tensors = {name: tensor for name, tensor in stored.items() if not CONSTANTS.fullmatch(name)}
    # A model without its output projection is stored without this prefix in its names.
    prefix = form_of(counterparts[0].model).prefix
    if not any(name.startswith(prefix) for name in tensors):
        tensors = {n if n.startswith("lm_head.") else prefix + n: tensor for n, tensor in tensors.items()}
    wanted = {name: shape for c in counterparts for name, shape in c.their_shapes.items()}
    missing = [name for name in wanted if name not in tensors]
    superfluous = [name for name in tensors if name not in wanted]
    known = [name for name in wanted if name in tensors]
    misshapen = [
        f"{name} is {tensors[name].shape} instead of {wanted[name]}"
        for name in known
        if tensors[name].shape != wanted[name]
    ]
    inexact = [f"{name} is {tensors[name].type}" for name in known if tensors[name].type not in EXACT_TYPES]
    complaints = {
        "must hold every tensor of the model; missing:": missing,
        "must hold only tensors that our model has; superfluous:": superfluous,
        "must hold tensors of the shapes that config.json describes;": misshapen,
        f"must hold {', '.join(EXACT_TYPES)}, which fp32 holds exactly;": inexact,
    }
    problems = [
        Problem("import.path", folder, f"{rule} {_some(names)}", WHOLE_MODEL)
        for rule, names in complaints.items()
        if names
    ]
    if problems:
        raise UserError(problems)
    return {name: tensors[name] for name in wanted}


def _some(names: Iterable[str]) -> str:
    first, more = list(names)[:MOST_NAMES_SHOWN], len(list(names)) - MOST_NAMES_SHOWN
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")
