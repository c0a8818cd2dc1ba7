"""One file per verb of the command line: `run(config, request)` returns the exit code.

The table of verbs is config/verbs.py. In reading order: train.py, check.py, config.py; data.py,
tokenizer.py; checkpoint.py and checkpoint_report.py; export.py, import_.py, generate.py; lineage.py,
report.py, bench.py; saved.py (what several verbs read of a checkpoint).
"""
