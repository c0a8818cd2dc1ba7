"""`distllm data [merge] [shard=I/N]`: turn documents into token files, or take them from the cache.

Killed, it goes on where it stopped. With `shard=I/N` it does a share of the work, on any machine; `merge`
puts the shares together.
"""

from __future__ import annotations

from distllm.config.compose import Request
from distllm.config.problems import user_error
from distllm.config.schema import Config
from distllm.data.preparation.prepare import merge, prepare, prepare_shard
from distllm.data.preparation.shards import Shard
from distllm.data.prepared import PreparedData
from distllm.trainer.reporter import report_progress


def run(config: Config, request: Request) -> int:
    job = (config.data, config.preparation, config.tokenizer)
    shard = request.arguments.get("shard")
    if shard is None:
        do = merge if request.action == "merge" else prepare
        _show(do(*job, report_progress))
        return 0
    if request.action == "merge":
        raise user_error(
            "shard", shard, "merge puts all shards together", "distllm data merge, without shard="
        )
    prepare_shard(*job, Shard.parse(shard), report_progress)
    print(f"{'shard':<12}{shard} is done; once all are: distllm data merge, with the same settings")
    return 0


def _show(prepared: PreparedData) -> None:
    for name, source in prepared.sources.items():
        for part, split in {"train": source.train, "validation": source.validation}.items():
            if split is None:
                print(f"{name:<12}{part:<12}none")
                continue
            counts = f"{split.num_documents:,} documents, {split.num_tokens:,} tokens"
            if split.num_bytes is not None:
                counts += f", {split.num_bytes:,} bytes"
            print(f"{name:<12}{part:<12}{counts}: {split.prefix}.bin")
    print(f"{'tokenizer':<12}{prepared.vocab_size:,} tokens: {prepared.tokenizer_folder}")
