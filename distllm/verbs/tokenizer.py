"""`distllm tokenizer`: train the tokenizer of a job, or take it from the cache."""

from __future__ import annotations

from distllm.config.compose import Request
from distllm.config.schema import Config
from distllm.data.preparation.prepare_tokenizer import prepare_tokenizer
from distllm.data.tokenizer import TextTokenizer
from distllm.trainer.reporter import report_progress


def run(config: Config, request: Request) -> int:
    folder = prepare_tokenizer(config.data, config.preparation, config.tokenizer, report_progress)
    tokenizer = TextTokenizer.load(folder, config.tokenizer.end_of_document)
    print(f"{folder / 'tokenizer.json'}: {tokenizer.vocab_size:,} tokens")
    return 0
