"""Every setting of a job, typed: one dataclass per group of `conf/`, units in the docstrings.

A frozen `Config` is all that the rest of the package sees of the configuration. Ranges of single settings
stand here, beside their types; rules that combine several settings are in `rules.py`.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from distllm.config.cluster_schema import Cluster
from distllm.config.data_schema import (
    STRICT,
    Data,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Preparation,
    Sequences,
)
from distllm.config.data_schema import Source as Source  # part of `Data`
from distllm.config.registry import FAMILIES, OBJECTIVES, OPTIMIZERS
from distllm.config.verb_schema import Bench, Export, Generate, Import, Select

# For `dataclasses.replace`, which knows fields by name; users' settings are read by alias only (validate.py).
BY_NAME_TOO = ConfigDict(**STRICT, validate_by_alias=True, validate_by_name=True)

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=STRICT)
class Run:
    """Output of the run.

    dir: folder of all files of a run; the same command with the same `dir` resumes.
    """

    dir: str


@dataclass(frozen=True, config=STRICT)
class Model:
    """Shape of the transformer; the vocabulary comes from the tokenizer.

    name: the model's name in summaries.
    family: one of `distllm/model/families`, which defines parameters, layer and form in Hugging Face's
        library.
    num_layers: transformer layers, each of attention and a feed-forward network.
    hidden_size: width of the residual stream.
    ffn_hidden_size: width inside the feed-forward network.
    num_attention_heads: heads of queries in each layer.
    num_query_groups: heads of keys and values; each serves equally many heads of queries (grouped-query
        attention, arXiv:2305.13245), as many as there are of these means one each.
    head_dim: width of one head; None means hidden_size / num_attention_heads.
    seq_length: tokens per training sequence.
    normalization: of the inputs of attention, feed-forward network and output projection.
    norm_epsilon: added to the mean square or variance before its root is taken.
    position_embedding: `rope` rotates queries and keys by their position (arXiv:2104.09864); `learned` adds a
        learned vector for each of seq_length positions to the embedding.
    rope_base: for `rope`, base of the geometric series of its frequencies; larger bases reach further.
    activation: of the feed-forward network; `swiglu` has a gate and so a third matrix (arXiv:2002.05202);
        `gelu_tanh` is the approximation of `gelu` that GPT-2 uses.
    bias: whether linear layers have biases.
    tie_embeddings: whether the output projection is the embedding.
    init_std: standard deviation of the normal initialisation; projections back into the residual stream use
        init_std / sqrt(2 * num_layers), as GPT-2 does.
    vocab_multiple: the vocabulary is padded to a multiple of this, under every layout alike, so that tensor
        parallelism can cut it; padding is never predicted.
    """

    name: str
    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt
    seq_length: PositiveInt
    head_dim: PositiveInt | None
    normalization: Literal["rmsnorm", "layernorm"]
    norm_epsilon: PositiveFloat
    position_embedding: Literal["rope", "learned"]
    rope_base: PositiveFloat
    activation: Literal["swiglu", "gelu", "gelu_tanh"]
    bias: bool
    tie_embeddings: bool
    init_std: PositiveFloat
    vocab_multiple: PositiveInt
    family: Annotated[str, FAMILIES.choice()] = "llama"

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Return the rows of the embedding: `vocab_size` rounded up to a multiple of vocab_multiple."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True, config=STRICT)
class Tokenizer:
    """Text to token ids.

    kind: `bpe` is a byte-level BPE, trained on the training documents unless `path` names a finished one;
        `bytes` is one token per byte and needs no training; `huggingface` reads the folder `path`.
    path: folder of a finished tokenizer, with a tokenizer.json; None means none.
    vocab_size: tokens in all, special tokens included; for `bpe` the size to train to, else None.
    special_tokens: further tokens that text is never split into, in the order of their ids.
    end_of_document: the token that closes every document.
    """

    kind: Literal["bpe", "bytes", "huggingface"]
    vocab_size: PositiveInt | None
    path: str | None
    special_tokens: list[str]
    end_of_document: str


@dataclass(frozen=True, config=STRICT)
class Parallel:
    """Degrees of model parallelism; data parallelism is the rest of the world size.

    tensor: ranks that share each layer (Shoeybi et al. 2019, arXiv:1909.08053).
    sequence: partition norms and residuals along the sequence over the tensor ranks (arXiv:2205.05198).
    pipeline: ranks that share the stack of layers, as stages (Narayanan et al. 2021, arXiv:2104.04473).
    virtual_pipeline: chunks of layers per stage, interleaved; 1 means one chunk and the 1F1B schedule.
    first_stage_layers, last_stage_layers: layers on that stage; None means as many as on the others.
    embedding_as_layer, loss_as_layer: count the embedding, the output projection as a layer when layers are
        divided among stages, so that the first, the last stage gets one less.
    """

    tensor: PositiveInt = 1
    sequence: bool = False
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    first_stage_layers: PositiveInt | None = None
    last_stage_layers: PositiveInt | None = None
    embedding_as_layer: bool = False
    loss_as_layer: bool = False


@dataclass(frozen=True, config=STRICT)
class Recompute:
    """Activations that the backward pass computes again instead of keeping them (arXiv:2205.05198).

    granularity: `none`; `selective` recomputes the attention core; `full` whole layers, keeping their inputs.
    num_layers: for `full`, layers per stage (and chunk) that are recomputed, counted from its first; None
        means all.
    """

    granularity: Literal["none", "selective", "full"]
    num_layers: PositiveInt | None


@dataclass(frozen=True, config=STRICT)
class Zero:
    """Partitioning over the data-parallel ranks (Rajbhandari et al. 2020, arXiv:1910.02054).

    stage: 0 partitions nothing, 1 optimizer states, 2 gradients too, 3 parameters too.
    bucket_size: elements per gradient reduction (and, for stage 3, per prefetch).
    overlap_comm: reduce gradients while the backward pass continues; at stage 1 also gather updated weights
        while the next forward pass begins.
    persistence_threshold: stage 3 keeps parameters of at most this many elements unpartitioned.
    offload_optimizer: keep optimizer states and fp32 weights in host memory (stages 1 to 3).
    """

    stage: Literal[0, 1, 2, 3]
    bucket_size: PositiveInt
    overlap_comm: bool
    persistence_threshold: NonNegativeInt
    offload_optimizer: bool


@dataclass(frozen=True, config=STRICT)
class Optimizer:
    """The update of the weights; norms and biases are never decayed.

    kind: one of `distllm/optimizers`; `adamw` is Loshchilov & Hutter 2019, arXiv:1711.05101.
    lr: peak learning rate.
    weight_decay: a step shrinks the weights by lr times this factor.
    betas: decay of the means of the gradient and of its square, per step.
    epsilon: added to the root of the mean square.
    clip_grad: largest global gradient norm; 0 means no clipping.
    """

    lr: PositiveFloat
    weight_decay: NonNegativeFloat
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)]
    epsilon: PositiveFloat
    clip_grad: NonNegativeFloat
    kind: Annotated[str, OPTIMIZERS.choice()] = "adamw"


@dataclass(frozen=True, config=STRICT)
class Objective:
    """The training objective.

    kind: one of `distllm/objectives`; `pretrain` is the cross-entropy of the next token.
    """

    kind: Annotated[str, OBJECTIVES.choice()] = "pretrain"


@dataclass(frozen=True, config=STRICT)
class Schedule:
    """Learning rate as a function of the step.

    kind: shape after the warm-up: `cosine` falls along half a cosine; `wsd` is constant, and falls linearly
        at the end; `constant` is constant.
    warmup_steps: linear rise from 0 to `optimizer.lr`.
    decay_steps: `cosine`: steps after warm-up until min_lr (None: the rest of the run); `wsd`: length of the
        final linear decay (None: a tenth of the run); `constant`: None.
    min_lr: learning rate at the end of the decay.
    """

    kind: Literal["cosine", "wsd", "constant"]
    warmup_steps: NonNegativeInt
    decay_steps: PositiveInt | None
    min_lr: NonNegativeFloat


@dataclass(frozen=True, config=STRICT)
class Train:
    """Length, batch, numerics and validation of training.

    steps: optimizer updates in all.
    global_batch_size: sequences per update.
    micro_batch_size: sequences per rank in one forward pass.
    seed: of the initial weights, the order of the data and generated text.
    precision: `bf16` computes in bfloat16 and keeps fp32 master weights and moments.
    gradient_accumulation: type in which gradients of microbatches are summed and reduced.
    compile: whether training steps compile the operations of a layer between its matrix products. That takes
        ten seconds at the first start on a machine, then two, and needs Triton, or on a CPU a C++ compiler.
    validation_interval: steps between validations; 0 means never.
    validation_sequences: sequences in one validation, or all there are if they are fewer.
    profile: `START:STOP` traces the steps from START to before STOP, as `step` in metrics.jsonl counts them;
        None means none.
    """

    steps: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    precision: Literal["fp32", "bf16"]
    gradient_accumulation: Literal["fp32", "bf16"]
    compile: bool
    validation_interval: NonNegativeInt
    validation_sequences: PositiveInt
    # The rule rejects a number alone, and says what to write.
    profile: Annotated[str, Field(strict=False, coerce_numbers_to_str=True)] | None


@dataclass(frozen=True, config=STRICT)
class Checkpoint:
    """Saving and resuming.

    interval: steps between saves, 0 means never (not even at the end).
    keep: number of newest checkpoints that stay.
    keep_every: checkpoints of every so many steps are never removed; 0 means none.
    async_save: training stands still only for the copy to host memory, which takes as many bytes there as the
        rank writes; the write continues in the background.
    timeout_seconds: within which the slowest rank must have written its part after the fastest.
    resume: `auto` takes the newest checkpoint of `run.dir`, `never` fails if `run.dir` holds one, a path
        starts from that checkpoint folder.
    """

    interval: NonNegativeInt
    keep: PositiveInt
    keep_every: NonNegativeInt
    async_save: bool
    timeout_seconds: PositiveInt
    resume: str


@dataclass(frozen=True, config=STRICT)
class Fault:
    """Reactions to hangs, bad steps and lost nodes.

    A step whose loss or gradients are not finite is tried again once, and then its samples are skipped. A
    spike is a loss or a gradient norm beyond median + spike_threshold robust standard deviations of the last
    spike_window steps (once there are as many).

    hang_seconds: a collective that takes longer ends the job.
    spike_window: preceding steps that define the usual range.
    spike_threshold: robust standard deviations above their median from which on it is a spike.
    spike_action: `skip` leaves out the samples of the step; `rewind` first returns to the last checkpoint;
        `off` ignores spikes.
    max_refused_steps: refused steps in a row at which the job gives up.
    max_rewinds: rewinds in one start of the job, after which it gives up.
    grace_seconds: time to stop after a signal (SIGTERM, SIGUSR1) before the job is ended.
    replan: where the layout is not legal on the given number of ranks, as after the loss of a node, take the
        nearest legal one with the same global batch instead of an error. null: as launch/torchrun.sh says,
        which asks for it when the number of nodes may vary (DISTLLM_ELASTIC=1).
    replanned: the changes of such a layout and why; written by distllm, not to be set.
    inject: faults for tests, each KIND:KEY=VALUE,... (see trainer/inject.py).
    """

    hang_seconds: PositiveInt
    spike_action: Literal["off", "skip", "rewind"]
    spike_window: Annotated[int, Field(ge=8)]
    spike_threshold: PositiveFloat
    max_refused_steps: PositiveInt
    max_rewinds: NonNegativeInt
    grace_seconds: PositiveInt
    replan: bool | None
    replanned: str | None
    inject: list[str]


@dataclass(frozen=True, config=STRICT)
class Logging:
    """Display and records of training.

    progress: `bar` for terminals, `lines` for files, `auto` chooses by the type of standard error.
    interval: steps between two plain lines.
    tensorboard: write event files into the run directory.
    wandb: log to Weights & Biases too.
    wandb_project: name of the project there.
    sample_prompt: text that is completed at the end of training.
    sample_tokens: length of the completion; 0 means none.
    """

    progress: Literal["auto", "bar", "lines", "none"]
    interval: PositiveInt
    tensorboard: bool
    wandb: bool
    wandb_project: str
    sample_prompt: str
    sample_tokens: NonNegativeInt


@dataclass(frozen=True, config=BY_NAME_TOO)
class Config:
    """A whole job. Built only by `compose.py`, equal on every rank.

    import_: users write `import`, which is a keyword of Python; `compose.to_plain` writes it too.
    """

    run: Run
    model: Model
    tokenizer: Tokenizer
    data: Data
    preparation: Preparation
    sequences: Sequences
    parallel: Parallel
    recompute: Recompute
    zero: Zero
    optimizer: Optimizer
    schedule: Schedule
    train: Train
    checkpoint: Checkpoint
    fault: Fault
    logging: Logging
    generate: Generate
    export: Export
    import_: Annotated[Import, Field(alias="import")]
    select: Select
    bench: Bench
    objective: Objective = field(default_factory=Objective)
    cluster: Cluster = field(default_factory=Cluster)
