"""A training step: forward and backward passes, reduction, the optimizer's update.

In reading order: engine.py (what the trainer asks of one); create.py (which of the two); pipeline.py
(Megatron's schedules), replicated.py and reduction.py (ZeRO stage 0); zero.py, zero_state.py and
deepspeed_quirks.py (stages 1 to 3: DeepSpeed's, and what must be changed inside it); tied.py (the
embedding on two stages); microbatch.py and objective.py (what is given, what is asked for); optimizer.py,
schedule.py; phases.py (where time goes) and gradient_watch.py (whose gradient went wrong). README.md says
what is equal, and what is sent.
"""
