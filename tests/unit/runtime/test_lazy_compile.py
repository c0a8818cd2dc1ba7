"""An import of Megatron Core and DeepSpeed compiles nothing, and its functions still work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import commands
import pytest
import torch

from distllm.runtime import lazy_compile

CHECK = """
import sys
from distllm.runtime import lazy_compile, quiet
quiet.silence()
{install}
import megatron.core.models.gpt, torch
import deepspeed.runtime.zero.muon.original_muon as muon
print("torch._inductor" in sys.modules, torch.compile.__module__, muon.muon_update.__name__)
"""


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_compiler_is_imported_only_without_it(is_installed: bool, tmp_path: Path) -> None:
    code = CHECK.format(install="lazy_compile.install()" if is_installed else "")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=commands.environment(), capture_output=True, text=True
    )
    assert result.stdout.splitlines()[-1] == f"{not is_installed} torch muon_update", result.stderr


def test_a_function_is_compiled_at_its_first_call_and_once() -> None:
    compiled: list[tuple[str, dict[str, object]]] = []

    def compile_now(function, **options):  # type: ignore[no-untyped-def]
        compiled.append((function.__name__, options))
        return function

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    plain = lazy_compile._later(compile_now, double)
    decorated = lazy_compile._later(compile_now, dynamic=True)(double)
    assert not compiled
    for function in (plain, plain, decorated):
        assert function(torch.ones(2)).tolist() == [2, 2]
    assert compiled == [("double", {}), ("double", {"dynamic": True})]
    assert plain.__name__ == "double"
