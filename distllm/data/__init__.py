"""From documents to what a rank reads in a step. README.md has the figures.

In reading order: sources/ (documents, whatever they lie in); tokenizer.py and tokenizer_training.py;
preparation/ (documents -> token files, once); cache.py (folders that are built once); indexed.py,
token_stream.py and file_array.py (token files); prepared.py (what preparation leaves) and record.py (what
is remembered of it). Then the order, which is arithmetic: order.py (a shuffle that is not stored),
mixture.py (which source a sample is drawn from), packing.py and sequences.py (a sequence by its number),
loader.py (a step of a rank) and prefetch.py.
"""
