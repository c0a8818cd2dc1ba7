"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, GELU, biases everywhere."""

from distllm.model.families.decoder import Decoder
from distllm.model.families.gpt2.huggingface import GPT2Form


class GPT2Family(Decoder):
    huggingface = GPT2Form()


GPT2 = GPT2Family()
