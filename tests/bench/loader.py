"""Rates of the loader, and what it costs to start, beside Megatron's GPTDataset on the same files.

    python tests/bench/loader.py [--json FILE]

Rate: tokens per second that one process reads in training order, sequences of 2,048 tokens from 50 million
tokens in documents of log-normal length (files in the page cache): the ways take turns, medians of 5.
Start: a process of its own opens the data and reads one batch; its time without imports, and the memory that
it needs besides them. 10**6 and 10**8 documents of 8 tokens, one epoch; and 10**11, whose files are sparse,
with only their ends written. Megatron keeps an index of its samples, which ours replaces by arithmetic.
"""

from __future__ import annotations

import argparse
import importlib
import json
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from distllm.bench.data import reading_rate
from distllm.config.schema import Sequences as Settings
from distllm.data.indexed import HEADER, MAGIC
from distllm.data.loader import TrainingData, TrainingSource
from distllm.data.mixture import Blend
from distllm.data.order import Order
from distllm.data.prepared import PreparedSource, Split
from distllm.data.sequences import open_sequences
from distllm.metrics.environment import describe_environment

SEQ_LENGTH, BATCH, REPEATS, SEED = 2048, 8, 5, 1234
RATE_TOKENS = 50_000_000
TOKENS_PER_DOCUMENT = 8
DOCUMENTS = (10**6, 10**8, 10**11)
SECONDS = 2.0
UINT16 = 8  # Megatron's code of the token type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--start", nargs=3, metavar=("WAY", "FOLDER", "DOCUMENTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        way, folder, documents = arguments.start
        print(json.dumps(start(way, Path(folder), int(documents))))
        return
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        rates = measure_rates(Path(folder))
        starts = measure_starts(Path(folder))
    print_tables(rates, starts)
    if arguments.json:
        result = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **describe_environment()}
        result |= {"seq_length": SEQ_LENGTH, "rates": rates, "starts": starts}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


# ---------------------------------------------------------------- token files


def write_pair(prefix: Path, lengths: np.ndarray) -> None:
    """A pair of files with documents of these lengths; the tokens are random."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    with open(f"{prefix}.idx", "wb") as index:
        index.write(HEADER.pack(MAGIC, 1, UINT16, len(lengths), len(lengths) + 1))
        lengths.astype("<i4").tofile(index)
        (offsets[:-1] * 2).astype("<i8").tofile(index)
        np.arange(len(lengths) + 1, dtype="<i8").tofile(index)
    generator = np.random.default_rng(0)
    with open(f"{prefix}.bin", "wb") as tokens:
        for first in range(0, int(offsets[-1]), 1 << 24):
            count = min(1 << 24, int(offsets[-1]) - first)
            generator.integers(0, 32_000, count, dtype=np.uint16).tofile(tokens)


def write_ends(prefix: Path, num_documents: int) -> None:
    """The same with documents of equal length, of which only what stands at the ends is written."""
    num_tokens = num_documents * TOKENS_PER_DOCUMENT
    with open(f"{prefix}.idx", "wb") as index:
        index.write(HEADER.pack(MAGIC, 1, UINT16, num_documents, num_documents + 1))
        index.seek(HEADER.size + (num_documents - 1) * 4)
        index.write(struct.pack("<i", TOKENS_PER_DOCUMENT))
        index.seek(HEADER.size + num_documents * 4 + (num_documents - 1) * 8)
        index.write(struct.pack("<q", (num_documents - 1) * TOKENS_PER_DOCUMENT * 2))
        index.seek(HEADER.size + num_documents * 12 + num_documents * 8)
        index.write(struct.pack("<q", num_documents))
    with open(f"{prefix}.bin", "wb") as tokens:
        tokens.truncate(num_tokens * 2)


# ---------------------------------------------------------------- the ways to read them


def ours(folder: Path, num_documents: int, num_tokens: int, packing: str = "chunk") -> Callable[[int], Any]:
    """Reads one sample of the training order."""
    split = Split(folder / "tokens", num_documents, num_tokens, None, 31_999)
    source = PreparedSource("made", folder, split, None, "made")
    settings = Settings(packing=packing, document_mask=packing != "chunk", prefetch=0)  # type: ignore[arg-type]
    sequences = open_sequences(source, split, settings, SEQ_LENGTH, 0, folder, report=lambda _: None)
    data = TrainingData({"made": TrainingSource(sequences, Order(SEED, "made"))})
    phases = [Blend(0, {"made": 1.0})]
    return lambda number: data.read(range(number * BATCH, (number + 1) * BATCH), phases)


def with_megatron(folder: Path, num_tokens: int) -> Callable[[int], Any]:
    """The same with Megatron's GPTDataset, as its own pretrain_gpt.py sets it up, one epoch."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.megatron_tokenizer import MegatronLegacyTokenizer

    class Tokenizer(MegatronLegacyTokenizer):
        """GPTDataset asks only for these."""

        vocab_size, eod, pad = 32_000, 0, 0
        vocab: dict[str, int] = {}  # noqa: RUF012
        inv_vocab: dict[int, str] = {}  # noqa: RUF012

        def tokenize(self, text: str) -> list[int]:
            raise NotImplementedError

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LENGTH,
        blend=([str(folder / "tokens")], None),
        split="1,0,0",
        path_to_cache=str(folder / "megatron"),
        tokenizer=Tokenizer("made"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    num_samples = (num_tokens - 1) // SEQ_LENGTH
    dataset, _, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [num_samples, 0, 0], lambda: True, config
    ).build()
    return lambda number: [dataset[number * BATCH + row] for row in range(BATCH)]


# ---------------------------------------------------------------- rates


def measure_rates(folder: Path) -> dict[str, dict[str, float]]:
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 200_000).astype(np.int64) + 2
    lengths = lengths[np.cumsum(lengths) <= RATE_TOKENS]
    place = folder / "rates"
    place.mkdir()
    write_pair(place / "tokens", lengths)
    num_tokens = int(lengths.sum())
    ways = {
        "ours, chunks": ours(place, len(lengths), num_tokens),
        "ours, best fit and document mask": ours(place, len(lengths), num_tokens, "best_fit"),
        "Megatron's GPTDataset": with_megatron(place, num_tokens),
    }
    num_batches = num_tokens // SEQ_LENGTH // BATCH - 1
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, read in ways.items():
            batches = reading_rate(lambda number, read=read: read(number % num_batches), SECONDS)  # type: ignore[misc]
            rates[name].append(batches * BATCH * SEQ_LENGTH)
    return {
        name: {"median": median(found), "lowest": min(found), "highest": max(found)}
        for name, found in rates.items()
    }


# ---------------------------------------------------------------- starts


def measure_starts(folder: Path) -> list[dict[str, Any]]:
    results = []
    for num_documents in DOCUMENTS:
        place = folder / f"{num_documents}"
        place.mkdir()
        if num_documents <= 10**8:
            write_pair(place / "tokens", np.full(num_documents, TOKENS_PER_DOCUMENT))
        else:
            write_ends(place / "tokens", num_documents)
        for way in ("ours", "megatron", "megatron again"):
            if way != "ours" and num_documents > 10**8:
                continue  # its indices alone would need hundreds of gigabytes
            command = [sys.executable, __file__, "--start", way, str(place), str(num_documents)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results.append({"way": way, "documents": num_documents, **json.loads(output.splitlines()[-1])})
    return results


def start(way: str, folder: Path, num_documents: int) -> dict[str, float]:
    num_tokens = num_documents * TOKENS_PER_DOCUMENT
    if way != "ours":
        importlib.import_module("megatron.core.datasets.gpt_dataset")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was of imports
    before, begin = peak_memory(), time.perf_counter()
    read = ours(folder, num_documents, num_tokens) if way == "ours" else with_megatron(folder, num_tokens)
    read(0)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "bytes": peak_memory() - before}


def peak_memory() -> int:
    """Resident, with pages of mapped files."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) * 1024


def print_tables(rates: dict[str, dict[str, float]], starts: list[dict[str, Any]]) -> None:
    theirs = rates["Megatron's GPTDataset"]["median"]
    print(f"{'one process reads':<36}{'M tokens/s':>12}{'of Megatron':>14}")
    for name, rate in rates.items():
        print(f"{name:<36}{rate['median'] / 1e6:>12.1f}{rate['median'] / theirs:>14.2f}")
    print(f"\n{'start':<20}{'documents':>18}{'seconds':>12}{'MiB':>10}")
    for found in starts:
        seconds, mebibytes = found["seconds"], found["bytes"] / 2**20
        print(f"{found['way']:<20}{found['documents']:>18,}{seconds:>12.3f}{mebibytes:>10.1f}")


if __name__ == "__main__":
    main()
