"""Which layers a stage holds; that these are Megatron's is in tests/unit/config/test_layout_rules.py."""

from shapes import config_of

from distllm.config.stages import pipeline_stages


def test_interleaved_chunks_go_round_the_stages() -> None:
    config = config_of("parallel.pipeline=2", "parallel.virtual_pipeline=2", "world_size=2")
    first, last = pipeline_stages(8, config.parallel)
    assert (first.layers, last.layers) == ([0, 1, 4, 5], [2, 3, 6, 7])
    assert first.chunks == (range(0, 2), range(4, 6))
    assert (first.is_first, first.is_last, last.is_first, last.is_last) == (True, False, False, True)


def test_one_stage_holds_everything() -> None:
    (stage,) = pipeline_stages(8, config_of("world_size=1").parallel)
    assert stage.layers == list(range(8))
    assert stage.is_first
    assert stage.is_last
