"""A run, from the command's config to the last row of metrics. README.md says what happens on faults.

In reading order: loop.py (the training loop, one screen) and job.py (the parts that it is given); build.py
(model and engine); open_data.py and batches.py; state.py (how far training has come), resume.py and
checkpointing.py; guards.py and recovery.py (a step that must not happen); evaluate.py; observer.py and
profile.py (what is measured of a step); reporter.py, describe.py, pending_rows.py and completion.py (what
the user reads); save_time.py (whether a save fits into the grace period); inject.py (faults for tests).
"""
