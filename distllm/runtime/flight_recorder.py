"""NCCL's own record of its last collectives, for the report on a hang."""

from __future__ import annotations

from typing import Any


def nccl_flight_recorder() -> Any:
    """Return NCCL's last collectives, which dist.start has asked it to record; None without NCCL."""
    import torch

    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return None
    try:
        import pickle

        from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]

        trace = pickle.loads(
            _dump_nccl_trace(includeCollectives=True, includeStackTraces=False, onlyActive=False)
        )
        keep = ("collective_seq_id", "p2p_seq_id", "profiling_name", "state", "input_sizes", "process_group")
        return [{key: entry.get(key) for key in keep} for entry in trace.get("entries", [])[-20:]]
    except Exception as error:  # it must not keep the diagnosis from being written
        return repr(error)
