"""Run `-m`: every combination of the swept values as a job of its own, one after another."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

from distllm.config import compose
from distllm.config.problems import EXIT_PREEMPTED, EXIT_USER_ERROR, Problem, UserError, user_error
from distllm.config.schema import Config

# From best to worst; anything that is not here is worse still.
SEVERITY = {0: 0, EXIT_PREEMPTED: 1, EXIT_USER_ERROR: 2}


def run(request: compose.Request) -> int:
    """Run the jobs of a sweep, each in a fresh process; return the worst exit code of them.

    A fresh process, because state that torch.distributed, Megatron Core and DeepSpeed keep per process must
    not pass from one job to the next. Nothing starts before all jobs are known to be valid.
    """
    verb = request.verb
    if verb.no_sweep:
        raise user_error("arguments", "--multirun", verb.no_sweep, f"distllm {verb.name} for each of them")
    if "RANK" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        world_size = os.environ.get("WORLD_SIZE", "unknown")
        rule = "a sweep starts single-process jobs itself"
        raise user_error(
            "world size", world_size, rule, "run -m without a launcher, or launch each job alone"
        )
    jobs = compose.expand(request)
    directory = _checked(request, [overrides for overrides, _ in jobs])[0].run.dir
    compose.save_sweep(request, directory)

    codes = []
    for number, (overrides, folder) in enumerate(zip(_overrides(jobs), _folders(jobs), strict=True)):
        job_directory = os.path.join(directory, folder)
        print(f"job {number + 1} of {len(jobs)}: {jobs[number][1]} -> {job_directory}", flush=True)
        command = [
            sys.executable,
            "-m",
            "distllm",
            verb.name,
            *request.words,
            *request.config_flags,
            *overrides,
        ]
        codes.append(_run_process([*command, compose.assignment("run.dir", job_directory)]))
        if codes[-1]:
            print(f"job {number + 1} of {len(jobs)}: exit code {codes[-1]}", file=sys.stderr, flush=True)
        if codes[-1] == EXIT_PREEMPTED:
            break  # pre-empted; the same command resumes here
    return max(codes, key=lambda code: SEVERITY.get(code, len(SEVERITY)))


def _checked(request: compose.Request, jobs: list[tuple[str, ...]]) -> list[Config]:
    flags = type(request.flags)(**{**vars(request.flags), "multirun": False})
    configs: list[Config] = []
    problems: dict[str, Problem] = {}
    for overrides in jobs:
        try:
            configs.append(compose.load(replace(request, overrides=overrides, flags=flags)))
        except UserError as error:
            problems |= {str(problem): problem for problem in error.problems}
    if problems:
        raise UserError(list(problems.values()))
    return configs


def _overrides(jobs: list[tuple[tuple[str, ...], str]]) -> list[list[str]]:
    return [
        [text for text in overrides if text.lstrip("+").partition("=")[0] != "run.dir"]
        for overrides, _ in jobs
    ]


def _folders(jobs: list[tuple[tuple[str, ...], str]]) -> list[str]:
    """Return a folder per job, named by its swept values if these are short and distinct, else by number."""
    names = [re.sub(r"[^\w.=,+-]", "_", swept) for _, swept in jobs]
    readable = len(set(names)) == len(names) and all(0 < len(name) <= 120 for name in names)
    return names if readable else [str(number) for number in range(len(jobs))]


def _run_process(command: list[str]) -> int:
    process = subprocess.Popen(command)
    # A pre-empted sweep must let its job save: SIGTERM is passed to the job, whose exit code then ends the
    # sweep.
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
    return code if code >= 0 else 128 - code
