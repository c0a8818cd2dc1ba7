"""What a job comes to, from shapes alone: no torch, no GPU. README.md compares it with measurements.

In reading order: rank_view.py (what is known of a rank) and held.py (its parameters); memory.py,
activations.py, gradients.py and partition.py (bytes on a rank); occupied.py, with libraries.py, buckets.py,
live.py and startup.py (what else occupies a device); communication.py, zero_communication.py and gather.py
(bytes sent); bubble.py (waiting in a pipeline); checkpoint_metadata.py (pieces of a checkpoint). fit.py
compares a job with the device of its cluster, nearest.py proposes legal layouts that fit, and replan.py takes
one when the number of nodes has changed.
"""
