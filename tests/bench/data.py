"""Rates of the data path, beside those of other tools.

    python tests/bench/data.py prepare [--megabytes N] [--repeats N] [--json FILE]

prepare: from JSON lines to token files, MB of text per second and core, on one and on two cores, beside the
tokenizer alone (of texts in memory, nothing written), `datasets.map` with it, and a pool that encodes one
document at a time for Megatron's builder. Every run is a process of its own that may use so many cores; the
ways take turns, and each is compared with the tokenizer alone in the same turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from distllm.bench.data import seconds
from distllm.config import schema
from distllm.metrics.environment import describe_environment

END_OF_DOCUMENT = "<|endoftext|>"
VOCAB_SIZE = 32_768
CHARACTERS_PER_DOCUMENT = 4_000
DOCUMENTS_PER_BATCH = 1_000
DOCUMENTS_PER_TASK = 32
CORES = (1, 2)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What all ways read. folder: of the tokenizer and of the documents."""

    folder: Path

    @property
    def documents(self) -> Path:
        return self.folder / "documents.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    def texts(self) -> list[str]:
        with self.documents.open() as lines:
            return [json.loads(line)["text"] for line in lines]


def make_corpus(folder: Path, num_bytes: int) -> Corpus:
    """The sources of the standard library in documents of some pages, again and again in other words."""
    from distllm.data.tokenizer_training import train_bpe

    corpus = Corpus(folder)
    train_bpe(_library_texts(0), VOCAB_SIZE, [], END_OF_DOCUMENT).save(folder)
    written, copy = 0, 0
    with corpus.documents.open("w") as lines:
        while written < num_bytes:
            for text in _library_texts(copy):
                lines.write(json.dumps({"text": text, "copy": copy}) + "\n")
                written += len(text.encode())
                if written >= num_bytes:
                    break
            copy += 1
    return corpus


def _library_texts(copy: int) -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in file.parts:
            text = file.read_bytes().decode(errors="replace")
            if copy:
                text = text.replace("self", f"me{copy}").replace("return", f"give{copy}")
            for start in range(0, len(text), CHARACTERS_PER_DOCUMENT):
                yield text[start : start + CHARACTERS_PER_DOCUMENT]


def time_ours(corpus: Corpus, num_cores: int, scratch: Path) -> float:
    from distllm.data.preparation.prepare import prepare

    data = schema.Data("jsonl", str(corpus.documents), "text", 0.02, str(scratch / "cache"))
    tokenizer = schema.Tokenizer(
        kind="huggingface",
        vocab_size=None,
        path=str(corpus.folder),
        special_tokens=[],
        end_of_document=END_OF_DOCUMENT,
    )
    preparation = schema.Preparation(None, "stop", None)  # by the cores that this process may use
    return seconds(lambda: prepare(data, preparation, tokenizer, lambda line: None))


def time_tokenizer(corpus: Corpus, num_cores: int, scratch: Path, fast: bool = True) -> float:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(corpus.tokenizer))
    tokenizer.encode_special_tokens = True
    encode = tokenizer.encode_batch_fast if fast else tokenizer.encode_batch
    texts = corpus.texts()
    batches = [texts[i : i + DOCUMENTS_PER_BATCH] for i in range(0, len(texts), DOCUMENTS_PER_BATCH)]

    def encode_all() -> None:
        for batch in batches:
            encode(batch, add_special_tokens=False)

    return seconds(encode_all)


def time_tokenizer_with_offsets(corpus: Corpus, num_cores: int, scratch: Path) -> float:
    return time_tokenizer(corpus, num_cores, scratch, fast=False)


def time_datasets(corpus: Corpus, num_cores: int, scratch: Path) -> float:
    import datasets
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false" if num_cores > 1 else "true"
    datasets.disable_progress_bars()
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encodings = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [encoding.ids for encoding in encodings]}

    rows = datasets.load_dataset(
        "json", data_files=str(corpus.documents), cache_dir=str(scratch), split="train"
    )
    return seconds(
        lambda: rows.map(
            encode,
            batched=True,
            num_proc=num_cores if num_cores > 1 else None,
            remove_columns=["text", "copy"],
        )
    )


def time_megatron(corpus: Corpus, num_cores: int, scratch: Path) -> float:
    """After the way of Megatron's tools/preprocess_data.py: document by document, gathered by the parent."""
    import multiprocessing

    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def preprocess() -> None:
        builder = IndexedDatasetBuilder(str(scratch / "x.bin"), dtype=DType.optimal_dtype(VOCAB_SIZE))
        context = multiprocessing.get_context("spawn")
        with (
            context.Pool(num_cores, _load_tokenizer, (str(corpus.tokenizer),)) as pool,
            corpus.documents.open() as lines,
        ):
            for ids in pool.imap(_encode_line, lines, DOCUMENTS_PER_TASK):
                builder.add_document(np.array(ids), [len(ids)])
        builder.finalize(str(scratch / "x.idx"))

    return seconds(preprocess)


_tokenizer: Any = None


def _load_tokenizer(file: str) -> None:
    global _tokenizer
    from tokenizers import Tokenizer

    _tokenizer = Tokenizer.from_file(file)


def _encode_line(line: str) -> list[int]:
    ids: list[int] = _tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
    return [*ids, _tokenizer.token_to_id(END_OF_DOCUMENT)]


REFERENCE = "tokenizer alone"
WAYS: dict[str, Callable[[Corpus, int, Path], float]] = {
    REFERENCE: time_tokenizer,
    "  with offsets": time_tokenizer_with_offsets,
    "distllm data": time_ours,
    "datasets.map": time_datasets,
    "pool, Megatron": time_megatron,
}


def bench_prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        corpus = make_corpus(Path(folder), arguments.megabytes * 1_000_000)
        num_bytes = sum(len(text.encode()) for text in corpus.texts())
        turns = [
            {(way, num_cores): _run_apart(way, num_cores, corpus) for num_cores in CORES for way in WAYS}
            for _ in range(arguments.repeats)
        ]
    results = []
    print(f"{'':<18}cores   MB/s and core   beside the tokenizer alone (worst - best turn)")
    for way, num_cores in turns[0]:
        rates = [num_bytes / 1e6 / turn[way, num_cores] / num_cores for turn in turns]
        ratios = [turn[REFERENCE, num_cores] / turn[way, num_cores] for turn in turns]
        results.append(
            {"way": way.strip(), "cores": num_cores, "mb_per_second_and_core": rates, "ratios": ratios}
        )
        spread = f"({min(ratios):.2f} - {max(ratios):.2f})"
        print(f"{way:<18}{num_cores:>5}{median(rates):>15.2f}{median(ratios):>10.2f} {spread}")
    return {"num_bytes": num_bytes, "vocab_size": VOCAB_SIZE, "results": results}


def _run_apart(way: str, num_cores: int, corpus: Corpus) -> float:
    """Seconds, in a new process, which sees `num_cores` cores."""
    arguments = [sys.executable, "-W", "ignore", __file__, "--run", way, str(num_cores), str(corpus.folder)]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:num_cores]))
    output = subprocess.run(
        ["taskset", "-c", cores, *arguments], check=True, capture_output=True, text=True
    ).stdout
    taken = float(output.splitlines()[-1])
    print(f"{way.strip()}, {num_cores} cores: {taken:.1f} s", file=sys.stderr, flush=True)
    return taken


def run_one(way: str, num_cores: int, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        print(WAYS[way](Corpus(folder), num_cores, Path(scratch)))


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"prepare": bench_prepare}


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        return run_one(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for scratch files")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    result = SECTIONS[arguments.section](arguments)
    if arguments.json:
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": describe_environment(),
            "tokenizers": version("tokenizers"),
            "load_average": [load_before, os.getloadavg()[0]],
        }
        arguments.json.write_text(json.dumps({**about, arguments.section: result}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
