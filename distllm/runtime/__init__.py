"""The process around training: start, stop, signals, hangs. Knows only config and layout.

In reading order: launcher.py (who started this rank), dist.py (process groups begin and end), quiet.py
(messages of libraries), light_imports.py with lazy_compile.py and lazy_names.py (a quick start), devices.py
(one GPU for a rank), cpu.py (Megatron Core without a GPU), half_products.py (bf16 on any processor),
allocator.py; signals.py (the wish to stop); ending.py (how a process leaves); activity.py and busy_time.py
(what a rank does), heartbeat.py (which it tells the others), cause.py (the one reason for which a job ends),
watchdog.py (which ends it), diagnosis.py, flight_recorder.py and verdict.py (nothing moves: who is to blame);
collective_counter.py (what is really sent, for tests and benchmarks).
"""
