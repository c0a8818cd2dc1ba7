"""Training steps side by side with other frameworks: the same model, weights, tokens and optimizer.

    python tests/bench/peers.py [--ranks 1|2] [--cases ...] [--contestants ...] [--precision fp32,bf16]
        [--turns N] [--steps N] [--threads N] [--venv DIR] [--json FILE]

Every contestant (tests/bench/peers/) is a process of its own, or one for each of two ranks, all of them alive
at a time. They take turns of a few steps, so that what disturbs the machine hits all alike; each turn is
compared with ours in the same turn, and the median of the ratios counts. Beside the rate stands its share of
what large matrix products reach on this machine, at 6 FLOP per parameter and token and 12 per layer, position
and width of attention. A step lasts from the end of the one before: data, forward, backward, clipping and
update. Memory is the peak of the resident set above what it was after the imports; the start lasts from the
start of the process until the first update is done. All begin with the same weights and see the same tokens:
in fp32 the first losses must agree to 1e-4, and the losses after all steps to 1e-3; a row that does not is
marked, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import random
import select
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from distllm.metrics.environment import describe_environment

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests" / "bench" / "peers"
SHAPE = {
    "num_layers": 8,
    "hidden_size": 512,
    "ffn_hidden_size": 1408,
    "num_heads": 8,
}
# Name: sequence length, vocabulary, sequences in a microbatch; 2,048 tokens in all of them.
CASES = {
    "512-8k": (512, 8192, 4),
    "2048-8k": (2048, 8192, 1),
    "512-32k": (512, 32_768, 4),
    "2048-32k": (2048, 32_768, 1),
}
OURS = "distllm"
# Sums in another order differ by 1e-6 at first; Adam, which divides by the gradient, lets that grow.
SAME_FIRST_LOSS, SAME_LAST_LOSS = 1e-4, 1e-3
ANSWER_SECONDS = 900
LOG_TAIL = 2000


@dataclasses.dataclass(frozen=True)
class Program:
    """file: in tests/bench/peers. needs_venv: stands on packages of requirements.txt there."""

    file: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    needs_venv: bool = False


ONE_RANK = {
    OURS: Program("ours.py"),
    "distllm, compiled": Program("ours.py", {"overrides": ["train.compile=true"]}),
    "bare loop, distllm's model": Program("bare.py"),
    "transformers": Program("huggingface.py"),
    "transformers, compiled": Program("huggingface.py", {"compile": True}),
    "transformers Trainer": Program("huggingface_trainer.py", needs_venv=True),
    "LitGPT": Program("litgpt_fabric.py", needs_venv=True),
    "LitGPT, loss in one": Program("litgpt_fabric.py", {"loss": {"chunk_size": 0}}, needs_venv=True),
    "LitGPT, compiled": Program("litgpt_fabric.py", {"compile": True}, needs_venv=True),
}
TWO_RANKS = {
    OURS: Program("ours.py", {"zero_stage": 1}),
    "distllm ZeRO-2": Program("ours.py", {"zero_stage": 2}),
    "distllm ZeRO-3": Program("ours.py", {"zero_stage": 3}),
    "transformers, ZeRO-1": Program("huggingface_deepspeed.py", {"zero_stage": 1}),
    "transformers, ZeRO-2": Program("huggingface_deepspeed.py", {"zero_stage": 2}),
    "transformers, ZeRO-3": Program("huggingface_deepspeed.py", {"zero_stage": 3}),
    "transformers, FSDP2": Program("huggingface_fsdp.py"),
}
PROGRAMS_BY_RANKS = {1: ONE_RANK, 2: TWO_RANKS}


class FailedError(Exception):
    """A contestant ended or hung; the message holds the end of its log."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """Of one grant. seconds, losses: of its steps, the loss as the mean over the ranks. peak_bytes,
    import_bytes: of the rank that has most."""

    seconds: list[float]
    losses: list[float]
    parameters: int
    startup_seconds: float
    import_bytes: int
    peak_bytes: int


class Contestant:
    """One program in a process for each rank."""

    def __init__(self, name: str, program: Program, job: dict[str, Any], setup: Setup, folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        python = setup.venv_python if program.needs_venv else sys.executable
        assert python, "an environment was made for the programs that need one"
        command = [str(python), "-W", "ignore", str(PROGRAMS / program.file)]
        command.append(json.dumps(job | {"options": setup.options(name, program)}))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port())}
        self.ranks = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log.open("ab"),
                text=True,
                env=environment(setup) | (rendezvous | rank_of(rank, setup) if setup.num_ranks > 1 else {}),
            )
            for rank in range(setup.num_ranks)
        ]

    def grant(self, steps: int) -> Answer:
        for rank in self.ranks:
            assert rank.stdin is not None, "it was opened"
            try:
                rank.stdin.write(f"{steps}\n")
                rank.stdin.flush()
            except BrokenPipeError:
                raise self._failed("ended") from None
        return self.answer()

    def answer(self) -> Answer:
        answers = [self._answer_of(rank) for rank in self.ranks]
        first = answers[0]
        losses = [sum(values) / len(answers) for values in zip(*(a["losses"] for a in answers), strict=True)]
        most = {key: max(a[key] for a in answers) for key in ("import_bytes", "peak_bytes")}
        return Answer(
            first["seconds"], losses, first["parameters"], max(a["startup_seconds"] for a in answers), **most
        )

    def _answer_of(self, rank: subprocess.Popen[str]) -> dict[str, Any]:
        assert rank.stdout is not None, "it was opened"
        if not select.select([rank.stdout], [], [], ANSWER_SECONDS)[0]:
            raise self._failed(f"gave no answer for {ANSWER_SECONDS} s")
        line = rank.stdout.readline()
        if not line:
            raise self._failed("ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failed(self, how: str) -> FailedError:
        return FailedError(f"{self.name} {how}:\n{self.log.read_text(errors='replace')[-LOG_TAIL:]}")

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()


@dataclasses.dataclass(frozen=True)
class Setup:
    """venv_python: where programs run that need the peers' packages. threads: of each rank. overrides: of
    distllm's own config, for our programs."""

    venv_python: Path | None
    num_ranks: int
    threads: int
    overrides: list[str]

    def options(self, name: str, program: Program) -> dict[str, Any]:
        if OURS not in name:
            return program.options
        return program.options | {"overrides": program.options.get("overrides", []) + self.overrides}


def environment(setup: Setup) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(setup.threads),
        "CONTESTANT_STARTED": str(time.monotonic()),
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def rank_of(rank: int, setup: Setup) -> dict[str, str]:
    ranks = str(setup.num_ranks)
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}


def unused_port() -> int:
    """Below the ports that the kernel gives out by itself: those may be taken before the ranks listen."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def make_venv(folder: Path) -> Path:
    """An environment of this interpreter's packages and the peers' beside them; returns its interpreter."""
    requirements = PROGRAMS / "requirements.txt"
    python, stamp = folder / "bin" / "python", folder / "peers-installed"
    if stamp.exists() and stamp.read_text() == requirements.read_text():
        return python
    venv.create(folder, with_pip=True, clear=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [str(python), "-m", "pip", "install", "-q", "--no-deps", "-r", str(requirements)]
    subprocess.run(install, check=True)
    stamp.write_text(requirements.read_text())
    return python


def write_weights(job: dict[str, Any], setup: Setup, folder: Path) -> Path:
    command = [sys.executable, "-W", "ignore", str(PROGRAMS / "weights.py"), json.dumps(job), str(folder)]
    subprocess.run(command, check=True, env=environment(setup), stdout=subprocess.DEVNULL)
    return folder / "model.safetensors"


def run_case(
    case: str, precision: str, programs: dict[str, Program], arguments: argparse.Namespace, setup: Setup
) -> list[dict[str, Any]]:
    """The rows of all contestants in one case; one that fails has a row that says why."""
    seq_length, vocab_size, micro_batch_size = CASES[case]
    shape = SHAPE | ({"num_layers": arguments.layers} if arguments.layers else {})
    job: dict[str, Any] = shape | {
        "seq_length": seq_length,
        "vocab_size": vocab_size,
        "micro_batch_size": micro_batch_size,
        "num_microbatches": arguments.microbatches,
        "precision": precision,
        "warmup_steps": arguments.warmup,
        "weights": "",
        "options": {},
    }
    tokens = seq_length * micro_batch_size * arguments.microbatches * setup.num_ranks
    peak = product_peak(precision, setup)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-")))
        job["weights"] = str(write_weights(job | {"precision": "fp32"}, setup, folder))
        failures: dict[str, str] = {}
        warm: dict[str, Answer] = {}
        alive: dict[str, Contestant] = {}

        def ask(name: str, steps: int) -> Answer | None:
            """0 steps: for the answer after the warm-up. None: it has failed, and has no further turn."""
            try:
                return alive[name].grant(steps) if steps else alive[name].answer()
            except FailedError as error:
                say(str(error))
                failures[name] = str(error)
                del alive[name]
                return None

        for name, program in programs.items():  # one after another: each has the cores to itself at its start
            alive[name] = Contestant(name, program, job, setup, folder)
            stack.callback(alive[name].close)
            if answer := ask(name, 0):
                warm[name] = answer
                say(f"{case} {precision}: {name} is ready after {answer.startup_seconds:.1f} s")
        turns = []
        for turn in range(arguments.turns):  # another begins each time: nobody always follows the same
            names = list(alive)
            first = turn % max(1, len(names))
            turns.append({name: ask(name, arguments.steps) for name in names[first:] + names[:first]})
    whole = [{name: answer for name, answer in turn.items() if answer} for turn in turns]
    sound = {name: answer for name, answer in warm.items() if name in alive}
    rows = list(_rows(programs, sound, whole, tokens))
    for row in rows:
        flops = flops_per_token(row["parameters"], job) * row["tokens_per_second"]
        row |= {"product_peak_flops": peak, "share_of_peak": flops / peak}
    lost = [{"contestant": name, "failed": reason} for name, reason in failures.items()]
    return [{"case": case, "precision": precision, **row} for row in rows + lost]


def product_peak(precision: str, setup: Setup) -> float:
    """FLOP/s of large matrix products with as many threads, of all ranks together, in their own processes."""
    program = (
        "import torch; from distllm.bench.timing import measured_peak_flops\n"
        f"print(measured_peak_flops(torch.device('cpu'), {precision!r}))"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program],
            env=environment(setup),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(setup.num_ranks)
    ]
    return sum(float(rank.communicate()[0]) for rank in ranks)


def flops_per_token(parameters: int, job: dict[str, Any]) -> float:
    """Forward and backward, by the convention of distllm/model/size.py; the embedding multiplies nothing."""
    multiplying = parameters - job["vocab_size"] * job["hidden_size"]
    return 6.0 * multiplying + 12.0 * job["num_layers"] * job["hidden_size"] * job["seq_length"]


def _rows(
    programs: dict[str, Program], warm: dict[str, Answer], turns: list[dict[str, Answer]], tokens: int
) -> Iterator[dict[str, Any]]:
    reference = OURS if OURS in warm else next(iter(warm), "")
    for name in warm:
        rates = [tokens * len(turn[name].seconds) / sum(turn[name].seconds) for turn in turns]
        theirs = [tokens * len(turn[reference].seconds) / sum(turn[reference].seconds) for turn in turns]
        ratios = [rate / other for rate, other in zip(rates, theirs, strict=True)]
        last = turns[-1][name]
        yield {
            "contestant": name,
            "tokens_per_step": tokens,
            "tokens_per_second": median(rates),
            "tokens_per_second_by_turn": rates,
            "ratio": median(ratios),
            "ratio_by_turn": ratios,
            "reference": reference,
            "peak_bytes": last.peak_bytes,
            "import_bytes": last.import_bytes,
            "startup_seconds": warm[name].startup_seconds,
            "parameters": warm[name].parameters,
            "lines": lines_of_user(programs[name]),
            "first_loss": warm[name].losses[0],
            "first_loss_difference": abs(warm[name].losses[0] - warm[reference].losses[0]),
            "last_loss": last.losses[-1],
            "last_loss_difference": abs(last.losses[-1] - turns[-1][reference].losses[-1]),
        }


def lines_of_user(program: Program) -> int:
    """Lines of code between the marks in its program and in what it shares with others; ours needs a command,
    of which each setting counts as a line."""
    if program.file == "ours.py":
        tree = ast.parse((PROGRAMS / program.file).read_text())
        (function,) = [node for node in tree.body if getattr(node, "name", "") == "overrides"]
        (returned,) = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
        assert isinstance(returned, ast.List), "the settings are listed"
        return len(returned.elts) - 1  # without those of the command line of this program
    counted, is_users = 0, False
    text_of_all = (PROGRAMS / program.file).read_text()
    if "import llama" in text_of_all:
        text_of_all += (PROGRAMS / "llama.py").read_text()
    for line in text_of_all.splitlines():
        text = line.strip()
        if text.startswith("# ---"):
            is_users = "user" in text
        elif is_users and text and not text.startswith("#") and "turns." not in text:
            counted += 1
    return counted


def is_same_work(row: dict[str, Any]) -> bool:
    """In bf16 what is rounded where differs from one to the next: only fp32 can be held to this."""
    if row["precision"] != "fp32":
        return True
    differences = row["first_loss_difference"], row["last_loss_difference"]
    return differences[0] <= SAME_FIRST_LOSS and differences[1] <= SAME_LAST_LOSS


def table(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["case", "contestant", "tok/s", "of ours (worst - best turn)", "of products' speed", "memory"]
    heads += ["start", "lines", "parameters", "first loss", "last loss"]
    lines = ["| " + " | ".join(heads) + " |", "|-|-|" + "-:|" * (len(heads) - 2)]
    for row in rows:
        case = f"{row['case']} {row['precision']}"
        if "failed" in row:
            lines.append(f"| {case} | {row['contestant']} | failed |" + " |" * (len(heads) - 3))
            continue
        ratios = row["ratio_by_turn"]
        cells = [
            case,
            row["contestant"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio']:.2f} ({min(ratios):.2f} - {max(ratios):.2f})",
            f"{row['share_of_peak']:.0%}",
            f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            f"{row['startup_seconds']:.1f} s",
            f"{row['lines']}",
            f"{row['parameters']:,}",
            f"{row['first_loss']:.5f}{'' if is_same_work(row) else ' NOT OURS'}",
            f"{row['last_loss']:.5f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, choices=PROGRAMS_BY_RANKS, default=1)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--contestants", help="names, separated by ';'")
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="in each turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first turn")
    parser.add_argument("--microbatches", type=int, default=1, help="in each step, of each rank")
    parser.add_argument("--threads", type=int, help="of each rank; all cores by default")
    parser.add_argument("--layers", type=int, help="instead of 8, to try it out")
    parser.add_argument("--ours", default="", help="overrides for distllm, separated by blanks")
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "distllm-peers")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for case in arguments.cases.split(","):
        if case not in CASES:
            parser.error(f"no case {case}: there are {', '.join(CASES)}")
    return arguments


def main() -> int:
    arguments = parse()
    known = PROGRAMS_BY_RANKS[arguments.ranks]
    names = arguments.contestants.split(";") if arguments.contestants else list(known)
    if unknown := [name for name in names if name not in known]:
        say(f"no contestants {unknown}: there are {list(known)}")
        return 2
    cores = len(os.sched_getaffinity(0))
    setup = Setup(
        make_venv(arguments.venv) if any(known[name].needs_venv for name in names) else None,
        arguments.ranks,
        arguments.threads or max(1, cores // arguments.ranks),
        arguments.ours.split(),
    )
    load_before, rows = os.getloadavg()[0], []
    for precision in arguments.precision.split(","):
        for case in arguments.cases.split(","):
            rows += run_case(case, precision, {name: known[name] for name in names}, arguments, setup)
            print(table(rows), flush=True)
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    file = arguments.json or PROGRAMS.parent / "results" / f"peers_{arguments.ranks}_cpu_{today}.json"
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": describe_environment(),
        "peers": [
            f"transformers=={version('transformers')}",
            *(PROGRAMS / "requirements.txt").read_text().splitlines()[2:],
        ],
        "threads": setup.threads,
        "load_average": [load_before, os.getloadavg()[0]],
        "rows": rows,
    }
    file.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all("failed" not in row and is_same_work(row) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
