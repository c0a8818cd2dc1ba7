"""`distllm data`: turn the documents of a job into token files, or take them from the cache."""

from __future__ import annotations

from distllm.config.schema import Config
from distllm.data.prepare import prepare
from distllm.trainer.reporter import report_progress


def run(config: Config) -> int:
    prepared = prepare(config.data, config.preparation, config.tokenizer, report_progress)
    for name, source in prepared.sources.items():
        for part, split in {"train": source.train, "validation": source.validation}.items():
            if split is None:
                print(f"{name:<12}{part:<12}none")
                continue
            num_bytes = "" if split.num_bytes is None else f", {split.num_bytes:,} bytes"
            print(
                f"{name:<12}{part:<12}{split.num_documents:,} documents, {split.num_tokens:,} tokens{num_bytes}: "
                f"{split.prefix}.bin"
            )
    print(f"{'tokenizer':<12}{prepared.vocab_size:,} tokens: {prepared.tokenizer_folder}")
    return 0
