"""Optimizers, each a recipe in a file: what it keeps, in which groups, how it is built.

A new one is a file with one `Recipe` (recipe.py), a line in the table OPTIMIZERS of `config/registry.py`, and
its defaults in `conf/optimizer/`. Engines, memory plan, checkpoint metadata and save times read the recipe.
"""

from distllm.optimizers.recipe import Recipe, recipe_of

__all__ = ["Recipe", "recipe_of"]
