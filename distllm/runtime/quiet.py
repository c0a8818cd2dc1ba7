"""Silence third-party messages that mean nothing to the user, at their source."""

from __future__ import annotations

import logging
import os
import warnings


def silence() -> None:
    """Silence them; call before torch, Megatron Core and DeepSpeed are imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorBoard's protobuf start-up lines
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else a warning after every fork
    # PyTorch's profiler (Kineto) logs its start and stop to standard error, above the level of errors.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # DeepSpeed 0.19 logs its whole configuration at INFO, on every rank.
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    for name in ("DeepSpeed", "megatron", "torch.distributed", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        r".*Transformer Engine.*",  # Megatron Core 0.16: optional, we use the local spec
        r".*Apex.*",
        r".*megatron\.core.*",
        r".*deprecated.*custom_fwd.*",
        r".*torch\.distributed\.reduce_op.*",
        r".*No CUDA runtime.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|deepspeed|torch)\..*")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(megatron|deepspeed|torch)\..*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|deepspeed)\..*")
