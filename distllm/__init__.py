"""distllm: distributed pretraining of large language models. A tour of the rooms.

    config        Hydra -> typed settings, and every rule that they must keep
    layout        which rank does what, process groups, where a piece of a parameter lies
    runtime       start and stop, signals, the watchdog; knows only config and layout
    data          documents -> token files -> sequences -> mixture -> what a rank reads in a step
    model         Megatron Core's GPT with our layers, initial weights and canonical names; families/
    engine        Megatron's schedules over ZeRO 1-3 or none
    checkpoint    write, verify, choose and read checkpoints
    metrics       rows, sinks, progress, plots, the run directory
    optimizers    recipes: what an optimizer keeps, and how it is built
    objectives    what a microbatch is, and what its loss is
    lineage       which documents went into which step, and the proof of it
    huggingface   folders as the library transformers reads and writes them
    plan          memory, communication, bubble and nearest legal layouts, from shapes alone
    trainer       the loop, guards, validation, resume, what the user reads
    bench         what `distllm bench` measures
    verbs         one file per verb

Imports go one way: config <- layout <- {data, model, engine, checkpoint, metrics} <- trainer <- verbs.
The rooms after metrics and before trainer join some of those five, or some of them build on it. Megatron
Core and DeepSpeed are imported in their adapters only. `tests/unit/test_structure.py` holds all that. To
read on: `trainer/loop.py`, then `trainer/job.py`.
"""

__version__ = "0.1.0"
