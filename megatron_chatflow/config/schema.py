"""Every setting of a run: plain dataclasses whose field names are Megatron's argument names.

The string under a field is its documentation and becomes the ``--help`` text of its flag
(`parse.py`). Defaults are Megatron-LM's where Megatron-LM has the setting. Nothing here imports
numpy, torch or megatron.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _choice(default: Any, *choices: str) -> Any:
    return field(default=default, metadata={"choices": choices})


def _path(default: Any = None) -> Any:
    return field(default=default, metadata={"path": True})


def _switch(default: bool, off: str) -> Any:
    """A switch that is on by default and that Megatron turns off with a flag of another name."""
    return field(default=default, metadata={"off": off})


def _flag(flag: str) -> Any:
    """A switch, off by default, whose flag Megatron spells in a way of its own."""
    return field(default=False, metadata={"flag": flag})


@dataclass
class ModelSettings:
    """The shape of the GPT."""

    num_layers: int = 0
    """Number of transformer layers."""
    hidden_size: int = 0
    """Width of the residual stream."""
    num_attention_heads: int = 0
    """Number of query heads."""
    ffn_hidden_size: int | None = None
    """Width of the feed-forward layer; 4 x hidden_size by default, with --swiglu two thirds of that
    rounded down to a multiple of 64.
    """
    kv_channels: int | None = None
    """Size of one attention head; hidden_size / num_attention_heads by default."""
    group_query_attention: bool = False
    """Grouped-query attention: several query heads share one key and value head."""
    num_query_groups: int | None = None
    """Number of key and value heads under --group-query-attention."""
    max_position_embeddings: int | None = None
    """Longest sequence the model is made for; seq_length by default. Sizes the table of
    learned_absolute positions.
    """
    position_embedding_type: str = _choice("learned_absolute", "learned_absolute", "rope", "none")
    """How positions enter: a learned table (GPT-2), rotary embeddings (LLaMA), or none."""
    rotary_base: int = 10000
    """Base (theta) of the rotary embeddings."""
    rotary_percent: float = 1.0
    """Share of each head that is rotated."""
    use_rope_scaling: bool = False
    """LLaMA 3.1's scaling of the rotary frequencies."""
    rope_scaling_factor: float = 8.0
    """Factor of --use-rope-scaling."""
    rotary_seq_len_interpolation_factor: float | None = None
    """Positions are divided by this (linear RoPE scaling); off by default."""
    normalization: str = _choice("LayerNorm", "LayerNorm", "RMSNorm")
    """The norm before attention, before the feed-forward layer and at the end."""
    norm_epsilon: float = 1e-5
    """Epsilon inside the norms."""
    swiglu: bool = False
    """SiLU-gated feed-forward layer (LLaMA) instead of GELU."""
    add_bias_linear: bool = _switch(True, off="--disable-bias-linear")
    """Biases in the linear layers; LLaMA has none."""
    add_qkv_bias: bool = False
    """A bias in the query, key and value projection only (Qwen2)."""
    qk_layernorm: bool = False
    """Normalise queries and keys in each head."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer weights of its own instead of the input embedding's."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this and of the tensor-parallel size; the padding
    is masked out of the softmax.
    """
    attention_dropout: float = 0.1
    """Dropout on attention probabilities."""
    hidden_dropout: float = 0.1
    """Dropout on the output of attention and of the feed-forward layer, and on the embedding."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; the two output projections of a layer get it
    divided by sqrt(2 x num_layers).
    """
    transformer_impl: str | None = _choice(None, "transformer_engine", "local")
    """Layers from Transformer Engine, or the portable ones in plain torch; by default Transformer
    Engine where CUDA and the library are.
    """


@dataclass
class ParallelSettings:
    """How the model and the batch are laid over the processes."""

    tensor_model_parallel_size: int = 1
    """Number of processes that share every layer."""
    pipeline_model_parallel_size: int = 1
    """Number of processes that share the stack of layers."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers in one model chunk of the interleaved pipeline schedule; off by default."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline stage; the other stages share the rest equally."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline stage; the other stages share the rest equally."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer when the layers are split: the first stage has one layer
    less.
    """
    account_for_loss_in_pipeline_split: bool = False
    """Count the output layer and the loss as a layer when the layers are split: the last stage has
    one layer less.
    """
    pipeline_model_parallel_layout: str | None = None
    """Every stage's content: E embedding, t a layer, L the loss, | between stages, x*N and (...)*N
    repeat, commas are ignored, e.g. "Et*3|(tt|)*6tL". With a multiple of the pipeline-parallel size
    of stages the schedule is interleaved: stage i is a model chunk of rank i modulo that size."""
    sequence_parallel: bool = False
    """Split norms and dropouts over the sequence among the tensor-parallel processes."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer's state over the data-parallel processes."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    ddp_bucket_size: int | None = None
    """Parameters in one bucket of gradients under --overlap-grad-reduce; the larger of 40,000,000
    and 1,000,000 x DP by default.
    """
    overlap_param_gather: bool = False
    """Gather parameters while the forward pass already runs; needs --use-distributed-optimizer and
    --overlap-grad-reduce.
    """
    distributed_backend: str | None = _choice(None, "nccl", "gloo")
    """Transport of the collectives: nccl on CUDA, gloo on a CPU, by default."""
    distributed_timeout_minutes: int = 10
    """A collective that hangs longer than this brings the run down."""
    init_timeout: int = 60
    """Seconds within which all processes must come together at the start; a process that does not
    come is reported by its rank, and the others end."""


@dataclass
class TrainingSettings:
    """Batches, length and precision of the run."""

    micro_batch_size: int = 1
    """Samples in one forward pass of one data-parallel rank."""
    global_batch_size: int | None = None
    """Samples in one optimizer step over all data-parallel ranks; micro_batch_size x data-parallel
    size by default.
    """
    rampup_batch_size: list[int] | None = None
    """START INCREMENT SAMPLES: grow the global batch from START by INCREMENT at even distances over
    SAMPLES samples.
    """
    train_iters: int | None = None
    """Length of the run in iterations (or give --train-samples)."""
    train_samples: int | None = None
    """Length of the run in samples (or give --train-iters)."""
    seed: int = 1234
    """Seed of the initial weights, the order of the data and dropout."""
    bf16: bool = False
    """Compute in bfloat16 with float32 main parameters; float32 throughout by default."""
    accumulate_allreduce_grads_in_fp32: bool = _switch(True, off="--grad-reduce-in-bf16")
    """Accumulate and reduce gradients in float32 under --bf16 (always on here unless
    --grad-reduce-in-bf16 is given).
    """
    recompute_granularity: str | None = _choice(None, "full", "selective")
    """Keep fewer activations and compute them again in the backward pass: full for whole layers,
    selective for parts of each; off by default.
    """
    recompute_method: str | None = _choice(None, "uniform", "block")
    """Which layers --recompute-granularity full means: uniform takes all of them in groups of
    --recompute-num-layers, block the first so many of each pipeline stage (of each model chunk,
    when interleaved)."""
    recompute_num_layers: int | None = None
    """Layers in a group of --recompute-method uniform, or layers that --recompute-method block
    computes again.
    """
    recompute_modules: list[str] | None = None
    """Parts that --recompute-granularity selective computes again: core_attn (the default), mlp,
    layernorm.
    """
    check_for_nan_in_loss_and_grad: bool = True
    """Do not take a step when the loss or the gradient norm is not finite;
    --max-nonfinite-iterations says when to stop.
    """
    max_nonfinite_iterations: int = 3
    """So many iterations in a row whose loss or gradient norm is not finite, or in which no token
    has loss, are skipped (their samples count as read, the weights stay); one more stops the run,
    naming its samples."""
    check_weight_hash_across_dp_replicas_interval: int | None = None
    """Compare the hashes of the weights of all data-parallel replicas after every so many
    iterations, and look whether the weights are finite; the run stops, naming ranks and weights,
    where they are not. Off by default: each time copies all weights to the host."""
    iterations_to_skip: list[int] | None = None
    """Iterations whose samples are passed over without training, e.g. those that a loss spike was
    traced to.
    """
    train_new_rows_samples: int = 0
    """Over the first so many samples (whole iterations) train only the embedding and output rows of
    the tokens that an extended tokenizer added, without weight decay; which ones token_map.json
    beside the tokenizer says."""
    ema_decay: float | None = None
    """Keep a running mean of the weights, X x mean + (1 - X) x weights after every iteration, in
    float32 beside them; it is saved with every checkpoint."""
    exit_interval: int | None = None
    """Save and exit after every iteration that is a multiple of this."""
    exit_duration_in_mins: int | None = None
    """Save and exit after so many minutes, with the exit code of a preempted run."""
    use_cpu_initialization: bool = False
    """Draw initial weights on the CPU, the same for every layout; always on where there is no CUDA
    device.
    """


@dataclass
class PrecisionSettings:
    """FP8: the products of the linear layers inside the transformer layers, beside --bf16 for all
    the rest.
    """

    fp8_format: str | None = _choice(None, "hybrid", "e4m3")
    """Compute in FP8: hybrid is E4M3 forward and E5M2 for gradients, e4m3 is E4M3 everywhere; off
    by default. On a machine without CUDA a reference in plain torch stands in for Transformer
    Engine."""
    fp8_recipe: str = _choice("delayed", "delayed", "tensorwise", "blockwise", "mxfp8")
    """Where scales come from: delayed (magnitudes of earlier iterations), tensorwise (the tensor's
    own), blockwise (128 values at a time, Hopper), mxfp8 (32 values at a time, Blackwell). The last
    two want --fp8-format e4m3."""
    fp8_margin: int = 0
    """Powers of two of headroom in the scales of --fp8-recipe delayed."""
    fp8_amax_history_len: int = 1
    """Iterations that --fp8-recipe delayed looks back."""
    fp8_amax_compute_algo: str = _choice("most_recent", "most_recent", "max")
    """Which magnitude of the history --fp8-recipe delayed takes."""
    fp8_param_gather: bool = False
    """Keep the weights of the linear layers in FP8 and gather them so; needs Transformer Engine and
    --use-distributed-optimizer.
    """
    tp_only_amax_red: bool = False
    """Under --fp8-recipe delayed share magnitudes among the tensor-parallel processes only, not
    with the data-parallel ones.
    """
    first_last_layers_bf16: bool = False
    """Keep the first and the last layers in bfloat16."""
    num_layers_at_start_in_bf16: int = 1
    """Layers kept at the start by --first-last-layers-bf16."""
    num_layers_at_end_in_bf16: int = 1
    """Layers kept at the end by --first-last-layers-bf16."""


@dataclass
class OptimizerSettings:
    """The optimizer, its learning rate and its weight decay."""

    optimizer: str = _choice("adam", "adam", "sgd")
    """The optimizer; adam is AdamW (decoupled weight decay)."""
    lr: float | None = None
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay. A decay to zero wipes out much of what the last stages
    teach: a third of --lr is a good floor.
    """
    lr_decay_style: str = _choice(
        "linear", "constant", "linear", "cosine", "inverse-square-root", "WSD"
    )
    """Form of the decay after the warm-up."""
    lr_decay_iters: int | None = None
    """Iterations over which the rate decays; the whole run by default."""
    lr_decay_samples: int | None = None
    """Samples over which the rate decays; the whole run by default."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up."""
    lr_warmup_samples: int = 0
    """Samples of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Linear warm-up as a fraction of the decay's length."""
    lr_warmup_init: float = 0.0
    """Learning rate at the start of the warm-up."""
    lr_wsd_decay_style: str = _choice(
        "exponential", "exponential", "linear", "cosine", "minus_sqrt"
    )
    """Form of the last phase of WSD (warm-up, stable, decay)."""
    lr_wsd_decay_iters: int | None = None
    """Iterations of the last phase of WSD."""
    lr_wsd_decay_samples: int | None = None
    """Samples of the last phase of WSD."""
    weight_decay: float = 0.01
    """Weight decay, on matrices only."""
    start_weight_decay: float | None = None
    """Weight decay at the start, when --weight-decay-incr-style is not constant."""
    end_weight_decay: float | None = None
    """Weight decay at the end, when --weight-decay-incr-style is not constant."""
    weight_decay_incr_style: str = _choice("constant", "constant", "linear", "cosine")
    """How weight decay moves over the run."""
    clip_grad: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns it off."""
    adam_beta1: float = 0.9
    """First moment's decay."""
    adam_beta2: float = 0.999
    """Second moment's decay."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    sgd_momentum: float = 0.9
    """Momentum of --optimizer sgd."""
    override_opt_param_scheduler: bool = _flag("--override-opt_param-scheduler")
    """On --load take this command's optimizer settings where they differ from the checkpoint's:
    learning rate and weight decay with their schedules, clipping, betas, epsilon, momentum."""
    use_checkpoint_opt_param_scheduler: bool = _flag("--use-checkpoint-opt_param-scheduler")
    """On --load take the checkpoint's optimizer settings, not this command's."""


@dataclass
class CheckpointSettings:
    """Where the run is kept."""

    save: str | None = _path()
    """The run directory: checkpoints, config.yaml, plan.json, metrics.jsonl, tensorboard/."""
    load: str | None = _path()
    """Run directory to resume from (usually the same as --save; an empty one starts afresh)."""
    save_interval: int | None = None
    """Iterations between checkpoints; one is always written at the end."""
    save_retain_interval: int | None = None
    """Keep the checkpoints of iterations that are multiples of this, and remove older ones but for
    the --most-recent-k newest.
    """
    most_recent_k: int | None = None
    """Keep this many newest checkpoints and remove older ones; all are kept by default, and 2 with
    --save-retain-interval.
    """
    async_save: bool = False
    """Write checkpoints while the training goes on."""
    exit_on_failed_save: bool = False
    """Stop when a checkpoint cannot be written (a full disk), instead of going on and trying again
    at the next.
    """
    ckpt_step: int | None = None
    """Load this iteration instead of the latest."""
    finetune: bool = False
    """Load weights only: iteration, curriculum and optimizer start afresh."""
    no_load_optim: bool = False
    """Do not load the optimizer's state."""
    no_save_optim: bool = False
    """Do not save the optimizer's state."""
    exit_on_missing_checkpoint: bool = False
    """Fail when --load has no checkpoint, instead of starting afresh."""


@dataclass
class DataSettings:
    """What is read."""

    seq_length: int = 0
    """Tokens in one sample."""
    curriculum: str | None = _path()
    """The curriculum file: domains and their shares over the run."""
    data_path: list[str] | None = None
    """WEIGHT PREFIX [WEIGHT PREFIX ...] or one PREFIX: a constant curriculum over these corpora,
    instead of --curriculum.
    """
    split: str = "969,30,1"
    """Train, validation and test shares of each domain's documents, cut in file order."""
    reset_position_ids: bool = False
    """Positions start again at every document (inside instruction windows always)."""
    reset_attention_mask: bool = False
    """Documents of one window do not attend to each other (inside instruction windows never)."""
    eod_mask_loss: bool = False
    """No loss at positions whose input is the end-of-document token."""
    amend_curriculum: bool = False
    """On resume with an edited curriculum: keep the past as it was and follow the file from here
    on.
    """


@dataclass
class TokenizerSettings:
    """The tokenizer that made the corpora."""

    tokenizer_type: str | None = _choice(
        None,
        "SentencePieceTokenizer",
        "GPTSentencePieceTokenizer",
        "Llama2Tokenizer",
        "HuggingFaceTokenizer",
        "GPT2BPETokenizer",
        "TikTokenizer",
        "ByteLevelTokenizer",
        "NullTokenizer",
    )
    """Kind of tokenizer; decides bits per byte, the end-of-document token and the size of the
    vocabulary.
    """
    tokenizer_model: str | None = _path()
    """File (or folder, for HuggingFaceTokenizer) of the tokenizer."""
    vocab_file: str | None = _path()
    """Vocabulary of GPT2BPETokenizer."""
    merge_file: str | None = _path()
    """Merges of GPT2BPETokenizer."""
    vocab_size: int | None = None
    """Size of the vocabulary before padding; the tokenizer's by default, needed without one."""


@dataclass
class ValidationSettings:
    """Held-out losses, one for each domain."""

    eval_interval: int | None = None
    """Iterations between validations; never by default."""
    eval_iters: int = 100
    """Global batches of held-out samples of each domain in one validation, always the same ones; a
    smaller held-out set is read whole.
    """


@dataclass
class LoggingSettings:
    """What is reported, and how often."""

    log_interval: int = 100
    """Iterations between lines on the console."""
    log_throughput: bool = False
    """Report TFLOP/s of each process (model FLOPs, without recomputation)."""
    tensorboard_dir: str | None = _path()
    """Folder of the TensorBoard log; SAVE/tensorboard by default."""
    tensorboard_log_interval: int = 1
    """Iterations between points in TensorBoard."""


@dataclass
class Config:
    """A run, complete. The fields are the sections of the YAML file."""

    model: ModelSettings = field(default_factory=ModelSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    data: DataSettings = field(default_factory=DataSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
