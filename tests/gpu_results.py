"""What launch/gpu-check runs on how many GPUs, and what it keeps of it. Needs no GPU itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

COUNTS = (1, 2, 4, 8)  # of GPUs that tests and layouts are made for
TAIL_CHARACTERS = 6000
SECONDS_OF_A_BENCH = 1800


@dataclass(frozen=True)
class Bench:
    """One call of `distllm bench train`."""

    recipe: str
    seq_length: int
    overrides: tuple[str, ...]

    @property
    def arguments(self) -> tuple[str, ...]:
        return ("bench", "train", f"+experiment={self.recipe}", *self.overrides)


def _longer(micro_batch_size: int, global_batch_size: int) -> tuple[str, ...]:
    """Sequences of 4,096 tokens, as many tokens a step as the recipe has with 2,048."""
    return (
        "model.seq_length=4096",
        f"train.micro_batch_size={micro_batch_size}",
        f"train.global_batch_size={global_batch_size}",
    )


BENCHES = (
    Bench("bench_125m", 2048, ()),
    Bench("bench_125m", 4096, _longer(8, 64)),
    Bench("bench_760m", 2048, ()),
    Bench("bench_760m", 4096, _longer(4, 32)),
    Bench("bench_1b", 2048, ()),
    Bench("bench_1b", 4096, _longer(2, 16)),
)


def gpus_to_use(count: int) -> int:
    """The largest count that tests and layouts are made for; 0 where there is no GPU."""
    return max((n for n in COUNTS if n <= count), default=0)


def visible_devices(count: int, setting: str | None) -> str:
    """CUDA_VISIBLE_DEVICES for the first `count` of those that the setting shows."""
    shown = setting.split(",") if setting else [str(number) for number in range(count)]
    return ",".join(shown[:count])


def read_tests(junit: str) -> list[dict[str, Any]]:
    """Of each test in pytest's --junitxml its name, seconds, outcome, and what it said if it did not pass."""
    tests = []
    for case in ElementTree.fromstring(junit).iter("testcase"):
        found = {child.tag: child for child in case}
        outcome = next((tag for tag in ("error", "failure", "skipped") if tag in found), "passed")
        test: dict[str, Any] = {
            "name": f"{case.get('classname')}::{case.get('name')}",
            "seconds": float(case.get("time", 0)),
            "outcome": {"failure": "failed"}.get(outcome, outcome),
        }
        if outcome in ("error", "failure"):
            test["message"] = (found[outcome].text or found[outcome].get("message") or "")[-TAIL_CHARACTERS:]
        elif outcome == "skipped":
            test["message"] = found[outcome].get("message")
        tests.append(test)
    return tests


def bench_row(bench: Bench, num_gpus: int, exit_code: int | None, output: str, file: Path) -> dict[str, Any]:
    """One row of the results. exit_code: None if it took too long; file: what `bench.json` named."""
    row: dict[str, Any] = asdict(bench) | {"num_gpus": num_gpus, "exit_code": exit_code}
    if exit_code == 0 and file.exists():
        return row | {"report": json.loads(file.read_text())}
    return row | {"output": output[-TAIL_CHARACTERS:]}


def is_good(results: dict[str, Any]) -> bool:
    """Whether tests ran, none failed, and every bench has figures."""
    outcomes = [test["outcome"] for test in results["tests"]]
    failed = {"failed", "error"} & set(outcomes)
    return "passed" in outcomes and not failed and all("report" in row for row in results["benches"])


def summary(results: dict[str, Any]) -> str:
    """What is shown at the end, in lines."""
    outcomes = [test["outcome"] for test in results["tests"]]
    lines = [", ".join(f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "error", "skipped"))]
    lines += [f"  {test['outcome']}: {test['name']}" for test in results["tests"] if _went_wrong(test)]
    for row in results["benches"]:
        place = f"{row['recipe']}, {row['seq_length']} tokens a sequence, {row['num_gpus']} GPUs"
        if "report" in row:
            found = row["report"]["results"]
            mfu = f", MFU {found['mfu']:.1%}" if found["mfu"] is not None else ""
            lines.append(f"{place}: {found['tokens_per_second']:,.0f} tokens/s{mfu}")
        else:
            lines.append(f"{place}: failed, exit code {row['exit_code']}")
    return "\n".join(lines)


def _went_wrong(test: dict[str, Any]) -> bool:
    return test["outcome"] in ("failed", "error")
