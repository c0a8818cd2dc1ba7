"""Writes the weights that all contestants start from: distllm's, as Hugging Face's files have them."""

from __future__ import annotations

import sys
from pathlib import Path

import contestant
from ours import build

from distllm.huggingface.counterpart import counterparts
from distllm.huggingface.write import write_weights


def main() -> None:
    job, _ = contestant.start()
    config, _, built = build(job)
    weights = {place.name: parameter.detach() for parameter, place in built.places.items()}
    pairs = counterparts(config.model, job.vocab_size)
    write_weights(Path(sys.argv[2]), pairs, lambda pair: weights[pair.name], "fp32", 10**10)


if __name__ == "__main__":
    main()
