"""What a job imports is light, and what is left out of it is there when it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import commands
import pytest
import torch

from distllm.runtime import lazy_compile

HEAVY = ["sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.utils.tensorboard"]
# What a job on CPUs does with these libraries: the model, an optimizer's step, checkpoints, ZeRO-3.
A_JOB = """
import sys
from distllm.runtime import light_imports, quiet
quiet.silence()
{install}
import torch
import distllm.model.build, distllm.checkpoint.dcp, distllm.engine.zero
import deepspeed.runtime.zero.muon.original_muon as muon
weight = torch.nn.Parameter(torch.ones(2))
weight.grad = torch.ones(2)
torch.optim.AdamW([weight], lr=0.1).step()
assert torch.compiler.disable(len)([1]) == 1  # as DeepSpeed's hooks of ZeRO-3
print([name for name in {heavy} if name in sys.modules])
print(torch.compile.__module__, muon.muon_update.__name__, weight.requires_grad, weight.tolist())
"""
DTENSORS_IN_A_CHECKPOINT = """
import sys, torch, torch.distributed as dist
from distllm.runtime import light_imports
light_imports.install()
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner_helpers import DTensor as stand_in
assert "torch.distributed.tensor" not in sys.modules and not isinstance(torch.ones(2), stand_in)
from torch.distributed.tensor import DTensor, Replicate
assert stand_in is not DTensor
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
made = stand_in.from_local(torch.arange(4.0), mesh, [Replicate()])
assert type(made) is DTensor and isinstance(made, stand_in)
dcp.save({{"x": made}}, checkpoint_id="{folder}")
read = DTensor.from_local(torch.zeros(4), mesh, [Replicate()])
dcp.load({{"x": read}}, checkpoint_id="{folder}")
print(read.to_local().tolist())
dist.destroy_process_group()
"""


def run(code: str, folder: Path) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=commands.environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("is_installed", [True, False])
def test_what_is_heavy_is_imported_only_without_it(is_installed: bool, tmp_path: Path) -> None:
    code = A_JOB.format(install="light_imports.install()" if is_installed else "", heavy=HEAVY)
    heavy, what_works = run(code, tmp_path)[-2:]
    assert heavy == str([] if is_installed else HEAVY)
    assert what_works == "torch muon_update True [0.8990000486373901, 0.8990000486373901]"


def test_dtensors_are_known_once_they_are_used(tmp_path: Path) -> None:
    code = DTENSORS_IN_A_CHECKPOINT.format(folder=tmp_path / "checkpoint")
    assert run(code, tmp_path)[-1] == "[0.0, 1.0, 2.0, 3.0]"


def test_a_step_is_kept_out_of_the_compiler_once_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    step = lazy_compile._choose(lambda: called.append("traced"), lambda: called.append("untraced"))
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    step()
    monkeypatch.setitem(sys.modules, "torch._dynamo", torch)
    step()
    assert called == ["untraced", "traced"]


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
