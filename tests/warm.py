"""What the process that ranks and commands are forked from does once: import, compose and plot.

See harness.py and commands.py. Without it each rank spends three seconds on what is the same for all.
"""

import importlib
import os
import tempfile
from pathlib import Path

from distllm.runtime import light_imports, quiet

os.environ.setdefault("DS_ACCELERATOR", "cpu")
quiet.silence()
light_imports.install()
for module in (
    "distllm.engine.zero",
    "distllm.model.decoder_layer",
    "distllm.model.families.gpt2",
    "distllm.model.families.llama",
    "distllm.objectives.pretrain",
    "distllm.optimizers.adamw",
    "distllm.verbs.generate",
    "distllm.verbs.train",
    "deepspeed.module_inject.auto_ep_layer",  # these two are imported by deepspeed.initialize
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "numpy.random",
    "torch.distributed.tensor",  # imported by torch.testing.assert_close
    "torch.profiler._cupti_monitor",
):
    importlib.import_module(module)

from distllm.config import compose  # noqa: E402
from distllm.metrics.plots import plot_loss  # noqa: E402

compose.load(compose.parse("train", ["data=stdlib", "model=tiny", "tokenizer=bytes"]))
with tempfile.TemporaryDirectory(prefix="warm-") as folder:
    plot_loss([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}], Path(folder, "loss.png"), "warm")
