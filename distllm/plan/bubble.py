"""The pipeline bubble: time that stages wait for each other while a step fills and drains the pipeline. Pure.

Narayanan et al. 2021 (arXiv:2104.04473, section 2.2): p stages of v chunks each, m microbatches; all stages
equally long, messages free.
"""

from __future__ import annotations


def bubble_of_ideal_time(pipeline: int, virtual_pipeline: int, num_microbatches: int) -> float:
    """Return the waiting time as a fraction of the step's time without it: (p - 1) / (m * v)."""
    return (pipeline - 1) / (num_microbatches * virtual_pipeline)


def bubble_of_step(pipeline: int, virtual_pipeline: int, num_microbatches: int) -> float:
    """Return the waiting time as a fraction of the whole step: (p - 1) / (m * v + p - 1)."""
    return (pipeline - 1) / (num_microbatches * virtual_pipeline + pipeline - 1)
