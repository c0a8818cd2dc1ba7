"""Training sequences by global sample number: which tokens they hold and which rank reads them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distllm.config.problems import user_error
from distllm.data.order import sequence_numbers
from distllm.data.prepared import Split
from distllm.data.token_stream import TokenStream


class Batches:
    """Sequences of fixed length from one split, in the order of training.

    The documents are one stream of tokens that is cut every seq_length tokens, across documents; each
    sequence takes one token more, the first of the next, as its last label. What is left at the end is not
    used. Global samples count through the epochs without end.
    """

    def __init__(self, split: Split, seq_length: int, seed: int, shuffle: bool = True) -> None:
        self.stream = TokenStream(split.prefix)
        self.seq_length = seq_length
        self.seed = seed
        self.shuffle = shuffle
        self.num_sequences = (self.stream.num_tokens - 1) // seq_length
        if self.num_sequences < 1:
            num_tokens = self.stream.num_tokens
            rule = (
                f"one sequence needs {seq_length + 1} tokens; the {split.prefix.name} split has {num_tokens}"
            )
            fix = "a shorter sequence, or more data (for validation: a larger data.validation_fraction)"
            raise user_error("model.seq_length", seq_length, rule, fix)

    def sequences(self, first: int, count: int) -> np.ndarray:
        """int64 [count]: which sequences the global samples first to first + count - 1 are."""
        if self.shuffle:
            return sequence_numbers(first, count, self.num_sequences, self.seed)
        return np.arange(first, first + count, dtype=np.int64) % self.num_sequences

    def samples(self, first: int, count: int) -> np.ndarray:
        """int64 [count, seq_length + 1]: tokens of the global samples first to first + count - 1."""
        starts = self.sequences(first, count) * self.seq_length
        windows = [self.stream.tokens[start : start + self.seq_length + 1] for start in starts]
        return np.stack(windows).astype(np.int64)

    def microbatches(
        self, first_sample: int, dp_rank: int, *, global_batch_size: int, micro_batch_size: int, dp_size: int
    ) -> Iterator[np.ndarray]:
        """What one data-parallel rank reads in one step: int64 [micro_batch_size, seq_length + 1] each."""
        for microbatch in range(global_batch_size // (micro_batch_size * dp_size)):
            samples = microbatch_samples(
                first_sample,
                microbatch,
                dp_rank,
                global_batch_size=global_batch_size,
                micro_batch_size=micro_batch_size,
                dp_size=dp_size,
            )
            yield self.samples(samples.start, len(samples))


def microbatch_samples(
    first_sample: int,
    microbatch: int,
    dp_rank: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    dp_size: int,
) -> range:
    """Global sample numbers of one microbatch of the step that begins with `first_sample`; all count from 0.

    Over all ranks and microbatches the step reads range(first_sample, first_sample + global_batch_size), each
    sample once, whatever dp_size is: so a run can go on with another number of ranks.
    """
    samples_per_microbatch = micro_batch_size * dp_size  # over all data-parallel ranks
    assert global_batch_size % samples_per_microbatch == 0, (
        f"rules.py must refuse a global batch of {global_batch_size} on {dp_size} ranks x {micro_batch_size}"
    )
    assert 0 <= dp_rank < dp_size, f"data-parallel rank {dp_rank} of {dp_size}"
    assert 0 <= microbatch < global_batch_size // samples_per_microbatch, (
        f"no microbatch {microbatch} in a step"
    )
    first = first_sample + microbatch * samples_per_microbatch + dp_rank * micro_batch_size
    return range(first, first + micro_batch_size)
