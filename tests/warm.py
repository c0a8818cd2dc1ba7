"""What the process that ranks are forked from imports once (see harness.py)."""

import importlib
import os

from distllm.runtime import quiet

os.environ.setdefault("DS_ACCELERATOR", "cpu")
quiet.silence()
for module in ("distllm.engine.zero", "distllm.verbs.train", "distllm.verbs.generate"):
    importlib.import_module(module)
