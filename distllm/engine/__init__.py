"""A training step: forward and backward passes, reduction, the optimizer's update.

In reading order: engine.py (the interface that the trainer calls); create.py (which of the two engines);
pipeline.py (Megatron's schedules); flat.py, reduction.py and gathering.py (ZeRO stages 0 and 1); zero.py,
zero_state.py and deepspeed_quirks.py (stages 2 and 3: DeepSpeed, and what must be changed inside it); tied.py
(the tied embedding on two pipeline stages); microbatch.py and objective.py (the input of a forward pass, and
its loss); optimizer.py and schedule.py; phases.py (where time goes) and gradient_watch.py (which gradient
went wrong first). README.md says which results are equal, and what ranks send.
"""
