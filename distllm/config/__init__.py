"""What the user writes, and what it may be. Pure but for compose.py; nothing here imports torch.

A command line becomes a frozen `Config`, or one message with all its mistakes. In reading order:
schema.py, data_schema.py, cluster_schema.py and verb_schema.py (the settings, typed); compose.py (Hydra,
here alone) and validate.py (plain values -> `Config`); rules.py, data_rules.py, layout_rules.py and
stage_rules.py (what settings must have in common); problems.py (a mistake: setting, value, rule, fix). Tables
that plugins extend: verbs.py and registry.py.

What follows from settings: axes.py, stages.py, profile.py. The rest: sweep.py (`-m`), compare.py and
upgrade.py (configs that checkpoints hold), meanings.py (what `distllm config` shows).
"""
