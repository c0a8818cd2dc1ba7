"""The blocks of text around a run."""

import re
from dataclasses import replace
from pathlib import Path

from distllm.metrics.summary import EndFacts, StartFacts, end_summary, start_summary

MIB = 2**20
START = StartFacts(
    run_dir=Path("runs/quickstart"),
    model_name="gpt-tiny",
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=688,
    num_attention_heads=8,
    num_query_groups=4,
    vocab_size=4096,
    seq_length=256,
    num_parameters=5_243_904,
    precision="bf16",
    zero_stage=2,
    grid="4 ranks = 2 data x 2 tensor\n0 1\n2 3",
    data_parallel=2,
    global_batch_size=16,
    micro_batch_size=4,
    steps=1000,
    resume_step=0,
    training_tokens=1_280_000,
    source_epochs={"text": (1.0, 3.2)},
    memory_bytes_per_rank={"weights": 20 * MIB, "activations": 240 * MIB},
    resumed_from=None,
)
END = EndFacts(
    step=1000,
    steps=1000,
    seconds=252,
    tokens_per_second=12_345.6,
    loss=3.2144,
    validation_loss=3.3,
    validation_bits_per_byte=1.832,
    gzip_bits_per_byte=2.51,
    goodput="90% productive",
    files={"metrics": Path("runs/quickstart/metrics.jsonl"), "loss curve": Path("runs/quickstart/loss.png")},
    sample="def f(n):\n\treturn n",
)


def sections(text: str) -> dict[str, list[str]]:
    """The lines of each section, by its name."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines()[2:]:
        name = line[:12].strip() or name
        found.setdefault(name, []).append(line[12:])
    return found


def test_start_gives_the_arithmetic_of_the_batch() -> None:
    got = sections(start_summary(START))
    assert got["batch"] == [
        "16 sequences a step = 2 microbatches x 4 sequences x 2 data-parallel ranks",
        "4,096 tokens a step = 16 sequences x 256 tokens",
    ]
    assert got["training"][0] == "1,000 steps = 4.096M tokens = 3.20 epochs over 1.28M training tokens"
    assert got["layout"] == ["4 ranks = 2 data x 2 tensor", "0 1", "2 3"]
    assert got["precision"] == ["bf16"]
    assert got["ZeRO"] == ["stage 2: optimizer states and gradients split over 2 data-parallel ranks"]
    assert got["run"] == ["runs/quickstart", "from scratch"]


def test_memory_is_itemised_and_summed() -> None:
    memory = sections(start_summary(START))["memory"]
    assert memory[1:] == ["weights       20.0 MiB", "activations  240.0 MiB", "total        260.0 MiB"]


def test_a_resumed_run_says_from_where() -> None:
    text = start_summary(
        replace(START, resume_step=400, resumed_from=Path("runs/a/checkpoints/step_00000400"))
    )
    assert "continues after step 400 of 1,000, from runs/a/checkpoints/step_00000400" in text


def test_one_of_a_thing_is_singular() -> None:
    text = start_summary(replace(START, global_batch_size=1, micro_batch_size=1, data_parallel=1, steps=1))
    assert "1 sequence a step = 1 microbatch x 1 sequence x 1 data-parallel rank\n" in text
    assert "1 step = 256 tokens" in text


def test_end_sets_the_model_beside_gzip() -> None:
    got = sections(end_summary(END))
    assert got["steps"] == ["1,000 of 1,000 in 4m12s, 12.3k tok/s"]
    assert got["loss"] == ["training    3.214 nats per token", "validation  3.300 nats per token"]
    assert got["text"][:2] == ["this model  1.832 bits per byte", "gzip -9     2.510 bits per byte"]
    assert got["files"][1] == "loss curve  runs/quickstart/loss.png"
    assert got["sample"] == ["| def f(n):", "|     return n"]


def test_end_leaves_out_what_was_not_measured() -> None:
    text = end_summary(
        replace(END, step=10, validation_loss=None, validation_bits_per_byte=None, sample=None)
    )
    assert text.startswith("distllm: training has stopped")
    assert set(sections(text)) == {"steps", "loss", "time", "files"}
    assert "gzip" not in text
    assert "gzip" not in end_summary(replace(END, gzip_bits_per_byte=None))


def test_a_sample_cannot_steer_the_terminal_nor_flood_it() -> None:
    text = end_summary(replace(END, sample="\x1b[2J\r\x07bell\n" + "word " * 1000))
    assert "| \\x1b[2J\\r\\x07bell" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    sample = sections(text)["sample"]
    assert len(sample) == 21
    assert sample[-1] == "| ..."


def test_blocks_are_ascii_and_at_most_100_wide() -> None:
    large = replace(START, zero_stage=3, data_parallel=1024, global_batch_size=4096, hidden_size=16_384)
    for text in (start_summary(large), end_summary(replace(END, sample="x" * 500))):
        assert text.isascii()
        assert max(map(len, text.splitlines())) == 100
        assert not any(line.endswith(" ") for line in text.splitlines())


def test_a_mixture_tells_of_its_sources() -> None:
    text = start_summary(replace(START, source_epochs={"code": (0.25, 1.5), "web": (0.75, 0.031)}))
    assert "code   25.00% of the samples, 1.50 epochs" in text
    assert "web    75.00% of the samples, 0.03 epochs" in text
