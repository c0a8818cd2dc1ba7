"""The proof of exactly-once finds what is wrong: each kind of fault is made here on purpose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distllm.data.indexed import TokenWriter
from distllm.data.loader import Located, TrainingData
from distllm.data.prepared import PreparedSource, Split
from distllm.data.record import to_record
from distllm.lineage import proof as proof_module
from distllm.lineage.history import History, Stretch, with_plan
from distllm.lineage.ledger import Ledger
from distllm.lineage.origins import trace
from distllm.lineage.proof import contradictions, prove

BATCH, STEPS, SEQ_LENGTH = 6, 40, 8
WEIGHTS = [{"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 3.0}]


def history(left_out: int = 0) -> History:
    """Two mixtures, and at step 20 some samples that are left out."""
    found: History = ()
    for step in range(STEPS):
        sample = step * BATCH + (left_out if step >= 20 else 0)
        found = with_plan(found, step, sample, BATCH, WEIGHTS[step >= 10])
    return found


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """Of 240 samples: several epochs of `a` (40 sequences) and of `b` (25)."""
    folder = tmp_path_factory.mktemp("prepared")
    records: dict[str, dict[str, Any]] = {}
    for name, num_sequences in {"a": 40, "b": 25}.items():
        (folder / name).mkdir()
        writer = TokenWriter(folder / name / "train", 300)
        writer.add(np.arange(num_sequences * SEQ_LENGTH + 1) % 300)
        writer.finish()
        split = Split(folder / name / "train", 1, num_sequences * SEQ_LENGTH + 1, None, 299)
        (folder / name / "manifest.json").write_text(f'{{"fingerprint": "{name}"}}')
        source = PreparedSource(name, folder / name, split, None, name)
        records[name] = to_record(source, True, num_sequences)
    return Ledger(3, SEQ_LENGTH, "chunk", folder, records, history(), ())


def test_a_run_as_it_should_be(ledger: Ledger) -> None:
    proof = prove(ledger, 1, STEPS)
    assert (proof.faults, proof.trained, proof.left_out) == ([], 240, 0)
    assert sum(proof.epochs["a"].values()) == pytest.approx(60 * 2 / 3 + 180 / 4, abs=3)
    assert proof.epochs["b"] == dict.fromkeys(range(6), 25) | {6: 4}


def test_a_part_of_a_run(ledger: Ledger) -> None:
    """Epochs that the steps enter and leave midway are no fault."""
    proof = prove(ledger, 7, 31)
    assert (proof.faults, proof.trained) == ([], 25 * BATCH)


def test_what_a_guard_left_out_is_no_fault(ledger: Ledger) -> None:
    refused = replace(ledger, history=history(left_out=6), skipped=((120, 126),))
    proof = prove(refused, 1, STEPS)
    assert (proof.faults, proof.trained, proof.left_out) == ([], 240, 6)


def test_samples_that_nobody_left_out_are_missed(ledger: Ledger) -> None:
    proof = prove(replace(ledger, history=history(left_out=6)), 1, STEPS)
    assert "6 samples from 120 on came in no step, between 20 and 21" in proof.faults
    assert any("are missing from epoch" in fault for fault in proof.faults)


def test_samples_that_come_twice_are_seen(ledger: Ledger) -> None:
    """As after a resume that has forgotten a step."""
    proof = prove(replace(ledger, history=(*history(), Stretch(30, 174, BATCH, WEIGHTS[1]))), 1, STEPS)
    assert "samples 174 to 179 came in step 30 and in step 31" in proof.faults
    assert any("came twice in epoch" in fault for fault in proof.faults)


def test_samples_that_should_have_been_left_out_are_seen(ledger: Ledger) -> None:
    proof = prove(replace(ledger, skipped=((60, 66),)), 1, STEPS)
    assert "step 11 holds samples that were to be left out" in proof.faults


def test_a_mixture_that_counts_wrongly_is_found(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a change of weights forgets what a source has given before (Megatron-LM#457)."""
    forgotten = [proof_module.blends(ledger.history)[1]]
    monkeypatch.setattr(proof_module, "blends", lambda _: [replace(forgotten[0], first=0)])
    right = prove(ledger, 1, STEPS)
    assert right.faults == [], "one mixture for all is as good"
    monkeypatch.undo()
    locate = TrainingData.locate

    def locate_wrongly(self: TrainingData, samples: np.ndarray, drawn_from: Any) -> Located:
        located = locate(self, samples, drawn_from)
        return replace(located, sequences=np.where(located.sequences == 7, 8, located.sequences))

    monkeypatch.setattr(TrainingData, "locate", locate_wrongly)
    faults = prove(ledger, 1, STEPS).faults
    assert "sequence 8 of a came twice in epoch 0" in faults
    assert "1 sequences of b are missing from epoch 0" in faults


def test_rows_and_checkpoints_must_agree(ledger: Ledger) -> None:
    row = {"step": 1, "consumed_samples": BATCH, "consumed_tokens/a": 40, "consumed_tokens/b": 8}
    assert contradictions(ledger, [row], {"step_00000001": ledger.history[:1]}) == []
    assert contradictions(ledger, [row | {"consumed_tokens/a": 32}], {}) == [
        "step 1 had consumed_tokens/a 32 in metrics.jsonl; the ledger says 40"
    ]
    assert contradictions(ledger, [row, row], {}) == ["metrics.jsonl does not hold every step from 1 on once"]
    assert contradictions(ledger, [row], {}, first_step=2) == [
        "metrics.jsonl does not hold every step from 2 on once"
    ]
    other = (Stretch(0, 0, 5, WEIGHTS[0]),)
    assert contradictions(ledger, [row], {"step_00000001": other}) == [
        "step_00000001 was written under another history"
    ]


def test_a_trace_names_tokens_of_documents(ledger: Ledger, tmp_path: Path) -> None:
    samples = trace(ledger, 11)
    assert [sample.sample for sample in samples] == list(range(60, 66))
    for sample in samples:
        (origin,) = sample.origins
        assert (origin.document, origin.start) == (0, sample.sequence * SEQ_LENGTH)
        assert origin.stop == origin.start + SEQ_LENGTH + 1
        assert (origin.file, origin.row) == (None, None), "only the token files are known here"
