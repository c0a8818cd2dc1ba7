"""The pipeline bubble against a simulation of stages that wait for each other."""

import pytest

from distllm.plan.bubble import bubble_of_ideal_time, bubble_of_step


def simulated_forward_time(pipeline: int, microbatches: int) -> int:
    """Time until the last stage has finished, when a microbatch takes a stage one unit of time."""
    finished = [0] * pipeline
    for _ in range(microbatches):
        ready = 0
        for stage in range(pipeline):
            ready = finished[stage] = max(ready, finished[stage]) + 1
    return finished[-1]


@pytest.mark.parametrize(("pipeline", "microbatches"), [(1, 4), (2, 1), (4, 4), (8, 32)])
def test_bubble_of_a_simulated_pipeline(pipeline: int, microbatches: int) -> None:
    time = simulated_forward_time(pipeline, microbatches)
    assert bubble_of_step(pipeline, 1, microbatches) == pytest.approx(1 - microbatches / time)
    assert bubble_of_ideal_time(pipeline, 1, microbatches) == pytest.approx(time / microbatches - 1)


def test_chunks_divide_the_bubble() -> None:
    assert bubble_of_ideal_time(4, 5, 8) == bubble_of_ideal_time(4, 1, 8) / 5 == 3 / 40
    assert bubble_of_step(4, 5, 8) == 3 / 43
