"""Model families, each in a folder: its table of parameters, its layer, its form in transformers, its costs.

A new family is a folder with one `Family` (family.py), and a line in the table FAMILIES of
`config/registry.py`. What most decoders have in common is in decoder.py: llama/ and gpt2/ say only what is
theirs. Nothing here imports torch before a model is built.
"""

from distllm.model.families.family import Family, family_of

__all__ = ["Family", "family_of"]
