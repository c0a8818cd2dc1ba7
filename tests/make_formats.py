"""Make the small runs in tests/formats whose checkpoints later versions must still read.

    python tests/make_formats.py CHECKOUT      # a checkout of the commit whose format is to be kept

Each run trains six steps with a checkpoint after four, which is the one that is kept: what a resume must
train in steps five and six is in `metrics.jsonl`. Checkpoint formats so far: 3, made of b33b1bd.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent / "formats"
STEPS, SAVED = 6, 4
KEPT = (f"checkpoints/step_{SAVED:08}", "metrics.jsonl", "config.yaml")
SHAPE = (
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.ffn_hidden_size=32",
    "model.num_attention_heads=2",
    "model.seq_length=16",
    "model.vocab_multiple=2",
)
# What a resume is started with, too. The names of the runs stand for the shapes.
RUNS = {
    "llama": ("model=tiny", *SHAPE, "model.num_query_groups=1"),
    "gpt2": ("model=gpt2_124m", *SHAPE, "model.num_query_groups=2"),
}
JOB = (
    "tokenizer=bytes",
    "data=text",
    "data.path=corpus/*.txt",
    "data.cache=cache",
    "data.validation_fraction=0",
    f"train.steps={STEPS}",
    "train.validation_interval=0",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "optimizer.lr=0.003",
    "optimizer.epsilon=1e-6",
    "schedule=constant",
    "schedule.warmup_steps=0",
    "checkpoint.interval=2",
    "checkpoint.keep=9",
    "logging.sample_tokens=0",
    "logging.tensorboard=false",
)


def write_corpus(folder: Path) -> None:
    words = ["def", "return", "if", "else", "for", "while", "import", "from", "class", "pass"]
    generator = random.Random(3)
    (folder / "corpus").mkdir(parents=True)
    for number in range(4):
        text = " ".join(generator.choices(words, k=60)) + "\n"
        (folder / "corpus" / f"{number}.txt").write_text(text)


def main(checkout: Path) -> None:
    from_manifest = None
    for name, shape in RUNS.items():
        with tempfile.TemporaryDirectory() as scratch:
            write_corpus(Path(scratch))
            command = [sys.executable, "-m", "distllm", "train", *JOB, *shape, f"run.dir={name}"]
            environment = os.environ | {"PYTHONPATH": str(checkout.absolute()), "OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=scratch, env=environment, check=True)
            manifest = json.loads(Path(scratch, name, KEPT[0], "manifest.json").read_text())
            from_manifest = manifest["format_version"]
            target = HERE / f"format_{from_manifest}" / name
            shutil.rmtree(target, ignore_errors=True)
            for part in KEPT:
                source = Path(scratch, name, part)
                (target / part).parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if source.is_dir() else shutil.copy)(source, target / part)
    print(f"checkpoints of format {from_manifest} are in {HERE}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
