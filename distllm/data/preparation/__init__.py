"""Documents -> token files: once, by many processes, killed at any time, with the same bytes.

In reading order: prepare.py (what the trainer calls), prepare_tokenizer.py; corpus.py (a source and its
folder) and cache_key.py (all that decides its bytes); splits.py (training or validation); units.py,
workers.py and pieces.py (units of work, who does them, what each leaves); join.py (pieces -> one corpus);
shards.py (shares on several machines); quarantine.py (what cannot be used), progress.py, token_files.py
(is it what it was?), and megatron_pair.py (a corpus that another tool tokenized).
"""
