"""What a run leaves and shows: rows, plots, the run directory.

In reading order: run_directory.py (what lies where) and run_lock.py (one job at a time); meter.py (a step
-> a row of `metrics.jsonl`); sinks.py, jsonl.py, event_file.py (where rows go); progress.py, plots.py and
summary.py (what the user sees); goodput.py (what became of a run's time); environment.py (what it ran
on); profile_summary.py; format.py (numbers as people read them).
"""
