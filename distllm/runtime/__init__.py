"""The process around training: start, stop, signals, hangs. Knows only config and layout.

In reading order: launcher.py (who started this rank), dist.py (process groups begin and end), quiet.py
(messages of libraries), devices.py (one GPU for a rank), cpu.py (Megatron Core without a GPU), allocator.py;
signals.py (the wish to stop); activity.py, heartbeat.py, watchdog.py and diagnosis.py (nothing moves: who is
to blame); collective_counter.py (what is really sent, for tests and benchmarks).
"""
