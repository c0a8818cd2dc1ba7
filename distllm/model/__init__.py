"""The model of a rank: Megatron Core's GPT with our layers, initial weights and names.

In reading order: families/ (what a family's parameters and layers are); parameters.py (the table of a
model's parameters); spec.py (our settings -> Megatron Core's); gpt.py, decoder_layer.py, layers.py;
attention.py and blocked_attention.py (for processors); norm.py, rotary.py, kernels.py (what lies between
the matrix products); loss.py and loss_chunks.py (output layer and cross-entropy in one); init.py (weights
from seed and name); build.py, materialize.py and sharding.py (this rank's part, built without memory and
filled one parameter after the other, and where it lies in the whole).
"""
