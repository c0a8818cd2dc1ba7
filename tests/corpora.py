"""Small corpora, and processes that prepare them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

from distllm.config import schema
from distllm.config.problems import UserError
from distllm.data.preparation.prepare import merge, prepare, prepare_shard
from distllm.data.preparation.shards import Shard
from distllm.data.token_stream import TokenStream

END = "<|endoftext|>"
BYTES = schema.Tokenizer(kind="bytes", vocab_size=None, path=None, special_tokens=[], end_of_document=END)
PREPARATION = schema.Preparation(workers=1, bad_input="quarantine", max_document_bytes=None)


def silent(line: str) -> None:
    assert "\n" not in line, "a report is one line"


def contents(folder: Path) -> dict[str, bytes]:
    """Everything but the manifest, which tells of times."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "manifest.json"}


def documents_of(prefix: Path) -> list[list[int]]:
    """The tokens of each document of a pair of token files."""
    stream = TokenStream(prefix)
    edges = stream.offsets(0, stream.num_documents + 1).tolist()
    return [stream.read(first, end).tolist() for first, end in itertools.pairwise(edges)]


def start(
    data: schema.Data,
    tokenizer: schema.Tokenizer = BYTES,
    preparation: schema.Preparation = PREPARATION,
    unit_bytes: int | None = None,
    do: str = "prepare",
) -> subprocess.Popen[str]:
    """Prepare in a process of its own, which leads a process group. do: prepare, merge, or a shard as 0/3."""
    settings = [dataclasses.asdict(part) for part in (data, tokenizer, preparation)]
    arguments = [sys.executable, "-W", "ignore", __file__, json.dumps([*settings, unit_bytes, do])]
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )


def main() -> int:
    given = json.loads(sys.argv[1])
    data, tokenizer = schema.Data(**given[0]), schema.Tokenizer(**given[1])
    preparation, unit_bytes, do = schema.Preparation(**given[2]), given[3], given[4]
    try:
        if do in ("prepare", "merge"):
            function = prepare if do == "prepare" else merge
            prepared = function(data, preparation, tokenizer, tell, unit_bytes)
            tell(" ".join(prepared.fingerprints.values()))
        else:
            prepare_shard(data, preparation, tokenizer, Shard.parse(do), tell, unit_bytes)
    except UserError as error:
        tell(str(error))
        return 2
    return 0


def tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
