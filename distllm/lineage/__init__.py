"""Which data went into which step, and the proof that each sequence came once.

In reading order: ledger.py (what the run directory keeps of it), history.py (samples of every step, by
arithmetic), origins.py (from a step back to files and rows), proof.py (none missing, none twice). The
verb is verbs/lineage.py.
"""
