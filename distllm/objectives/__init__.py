"""Objectives, each in a file: what a microbatch is, and what its loss is.

A new one is a file with one subclass of `engine/objective.py`'s Objective, a line in the table OBJECTIVES of
`config/registry.py`, and its name in `conf/objective/`.
"""

from distllm.config.registry import OBJECTIVES
from distllm.config.schema import Config
from distllm.engine.objective import Objective


def create_objective(config: Config) -> Objective:
    objective: Objective = OBJECTIVES[config.objective.kind](config)
    return objective
