"""`distllm lineage`: what data went into which step, and the proof that each sequence came once."""

from __future__ import annotations

from pathlib import Path

from distllm.checkpoint.manifest import read_manifest
from distllm.checkpoint.retention import list_checkpoints
from distllm.config.compose import Request
from distllm.config.problems import user_error
from distllm.config.schema import Config
from distllm.lineage.history import History, samples_of_step
from distllm.lineage.ledger import Ledger, read_ledger
from distllm.lineage.origins import Origin, TracedSample, trace
from distllm.lineage.proof import Proof, contradictions, prove
from distllm.metrics.format import block, plural
from distllm.metrics.run_directory import RunDirectory
from distllm.metrics.sinks import read_rows
from distllm.trainer.resume import saved_state

EXIT_NOT_PROVEN = 1
HEADER = ("sample", "source", "epoch", "sequence", "document", "tokens", "file", "row")


def run(config: Config, request: Request) -> int:
    arguments = request.arguments
    directory = RunDirectory(Path(config.run.dir), create=False)
    ledger = read_ledger(directory)
    rows = [row for row in read_rows(directory.metrics_path) if "loss" in row]
    last_step = rows[-1]["step"] if rows else 0
    if "step" in arguments:
        print(trace_text(ledger, _number("step", arguments["step"]), last_step))
        if arguments.get("verify") != "true":
            return 0
    elif arguments.get("verify") != "true":
        fix = "distllm lineage run.dir=DIR step=120, or verify=true"
        raise user_error("arguments", "none", "must say which step, or ask for the proof", fix)
    if not last_step:
        raise user_error("run.dir", directory.path, "must be a run that has taken a step", "train first")
    first, last = _steps(arguments.get("steps", f"1:{last_step}"), last_step)
    proof = prove(ledger, first, last)
    starts = [event["step"] for event in directory.read_events() if event["kind"] == "start"]
    proof.faults += contradictions(ledger, rows, _histories(directory), min(starts, default=0) + 1)
    print(proof_text(proof, directory))
    return EXIT_NOT_PROVEN if proof.faults else 0


def trace_text(ledger: Ledger, step: int, last_step: int) -> str:
    """One line for each document of each sequence."""
    samples = samples_of_step(ledger.history, step)
    title = (
        f"step {step:,}: samples {samples.start:,} to {samples.stop - 1:,}, "
        f"{plural(len(samples), 'sequence')} of {ledger.seq_length:,} tokens; rows are counted from 0"
    )
    if step > last_step:
        title += f"\nnot taken yet: this is the plan after the {last_step:,} steps that are done"
    lines = [HEADER, *(line for sample in trace(ledger, step) for line in _lines(sample))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([title, *(line.rstrip() for line in table)])


def _lines(sample: TracedSample) -> list[tuple[str, ...]]:
    place = (str(sample.sample), sample.source, str(sample.epoch), str(sample.sequence))
    return [
        (*(place if number == 0 else ("",) * len(place)), *_cells(origin))
        for number, origin in enumerate(sample.origins)
    ]


def _cells(origin: Origin) -> tuple[str, ...]:
    tokens = f"{origin.start}:{origin.stop} of {origin.num_tokens}"
    return str(origin.document), tokens, origin.file or "-", "-" if origin.row is None else str(origin.row)


def proof_text(proof: Proof, directory: RunDirectory) -> str:
    sections = {
        "run": str(directory.path),
        "steps": f"{proof.first_step:,} to {proof.last_step:,}, {plural(proof.trained, 'sequence')}",
        "left out": f"{plural(proof.left_out, 'sample')} that a guard has refused",
        "epochs": "\n".join(
            f"{name}  epoch {epoch}: {count:,} of {plural(proof.num_sequences[name], 'sequence')}, each once"
            for name, epochs in proof.epochs.items()
            for epoch, count in epochs.items()
        ),
        "checked": "samples of all steps, sequences of all epochs, metrics.jsonl, checkpoints",
    }
    if proof.faults:
        sections["epochs"] = sections["epochs"].replace(", each once", "")
        sections["wrong"] = "\n".join(proof.faults)
    outcome = "NOT exactly once" if proof.faults else "exactly once"
    return block(f"distllm lineage: {outcome}", sections)


def _histories(directory: RunDirectory) -> dict[str, History]:
    """Of the run's own checkpoints that hold one; what is damaged is passed over by `train`, too."""
    histories = {}
    for path in list_checkpoints(directory.checkpoints_path):
        try:
            manifest = read_manifest(path)
        except (OSError, ValueError):
            continue
        if manifest.details.get("state"):
            histories[path.name] = saved_state(manifest).history
    return histories


def _steps(text: str, last_step: int) -> tuple[int, int]:
    first, _, last = text.partition(":")
    first_step, final = _number("steps", first), _number("steps", last or first)
    if not first_step <= final <= last_step:
        rule = f"must be FIRST:LAST within the {last_step:,} steps that are done"
        raise user_error("steps", text, rule, f"steps=1:{last_step}")
    return first_step, final


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise user_error(name, text, "must be the number of an update, the first being 1", f"{name}=120")
    return int(text)
