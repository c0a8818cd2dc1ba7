"""`distllm data`: turn the documents of a job into token files, or take them from the cache."""

from __future__ import annotations

from distllm.config.schema import Config
from distllm.data.prepare import prepare
from distllm.trainer.reporter import report_progress


def run(config: Config) -> int:
    prepared = prepare(config.data, config.tokenizer, report_progress)
    splits = {"train": prepared.train, "validation": prepared.validation}
    for name, split in splits.items():
        if split is None:
            print(f"{name:<12}none")
            continue
        print(
            f"{name:<12}{split.num_documents:,} documents, {split.num_tokens:,} tokens, "
            f"{split.num_bytes:,} bytes: {split.prefix}.bin"
        )
    print(f"{'tokenizer':<12}{prepared.vocab_size:,} tokens: {prepared.tokenizer_folder}")
    return 0
