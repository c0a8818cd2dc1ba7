"""What a job comes to, from shapes alone: no torch, no GPU. README.md compares it with measurements.

In reading order: rank_view.py (what is known of a rank) and held.py (its parameters); memory.py,
activations.py, gradients.py and partition.py (bytes on a rank); communication.py, zero_communication.py
and gather.py (bytes sent); bubble.py (waiting in a pipeline); checkpoint_metadata.py (pieces of a
checkpoint). nearest.py proposes legal layouts, and replan.py takes one when the number of nodes has
changed.
"""
