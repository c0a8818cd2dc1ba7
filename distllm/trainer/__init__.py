"""A run, from the command's config to its last row. README.md tells what happens on faults.

In reading order: loop.py (one screen) and job.py (what it is given); open_data.py, batches.py; state.py
(how far training has come), resume.py and checkpointing.py; guards.py and recovery.py (a step that must
not happen); evaluate.py; observer.py and profile.py (what is measured of a step); reporter.py, describe.py,
pending_rows.py, completion.py (what the user reads); save_time.py (whether a save still fits); inject.py
(faults for tests).
"""
