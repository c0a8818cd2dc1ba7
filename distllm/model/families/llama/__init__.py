"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783): RMSNorm, rotary positions, SwiGLU."""

from distllm.model.families.decoder import Decoder
from distllm.model.families.llama.huggingface import LlamaForm


class Llama(Decoder):
    huggingface = LlamaForm()


LLAMA = Llama()
