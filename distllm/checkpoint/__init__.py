"""Checkpoints that any layout reads: whole tensors, written by all ranks, verified. Figures: README.md.

In reading order: store.py (one checkpoint on disk) and manifest.py (what it says of itself, last); dcp.py
(the files) and pieces.py (what a rank holds, cut into boxes); integrity.py (sizes and hashes); storage.py
(where it lies); async_writer.py (saves during training); retention.py (which to resume from, which may
go) and survey.py (what lies there, without torch).
"""
