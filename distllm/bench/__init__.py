"""What `distllm bench ACTION` measures: one module per action. README.md has tables.

train.py, layouts.py, recompute.py, checkpoint.py, data.py and startup.py are the actions. Below them:
engine.py (a job without its data), local_ranks.py (ranks on this machine), fake_world.py (one rank of
thousands), saving.py, scaling.py,
timing.py, counting_store.py and report.py (a table and JSON).
"""
