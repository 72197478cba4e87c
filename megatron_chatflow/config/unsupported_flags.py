"""Flags of Megatron-LM that are not supported, each with the message that a user gets."""

_GROUPS: dict[str, str] = {
    "this is always so here; drop the flag": (
        "--use-mcore-models --no-data-sharding --no-log-loss-scale-to-tensorboard"
    ),
    "set by the platform (see `chatflow doctor`), never by hand; drop the flag": (
        "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion "
        "--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion "
        "--no-persist-layer-norm --cross-entropy-loss-fusion --empty-unused-memory-level "
        "--manual-gc --manual-gc-interval --train-sync-interval --use-tp-pp-dp-mapping"
    ),
    "the blend is computed, not built, so there is no index to cache; drop the flag": (
        "--data-cache-path --mid-level-dataset-surplus --num-dataset-builder-threads "
        "--dataloader-fast-cache-load --dataloader-defer-npy-index-mmap "
        "--per-dataset-sequences-path --object-storage-cache-path"
    ),
    "there are no mixture-of-experts layers here; drop the flag": (
        "--expert-model-parallel-size --num-experts --moe-router-topk"
    ),
    "the loss is always the mean over the tokens of the global batch here; drop the flag": (
        "--calculate-per-token-loss"
    ),
    "attention is chosen with the layers (--transformer-impl); drop the flag": (
        "--use-flash-attn --attention-backend"
    ),
    "write --position-embedding-type rope": "--use-rotary-position-embeddings",
    "write --position-embedding-type none": "--no-position-embedding",
    "only bfloat16 and float32 are supported; write --bf16": "--fp16",
    "loss scaling belongs to fp16, which is not supported; write --bf16 and drop the flag": (
        "--loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis"
    ),
    (
        "documents of any length share a window here, and context parallelism wants each of "
        "them to be a multiple of twice its size; use --tensor-model-parallel-size with "
        "--sequence-parallel, and --recompute-granularity for long windows"
    ): "--context-parallel-size --cp-comm-type --hierarchical-context-parallel-sizes",
    "write --recompute-granularity selective": "--recompute-activations",
    (
        "use --sequence-parallel: what it saves is split over the tensor-parallel processes already"
    ): "--distribute-saved-activations",
    (
        "Transformer Engine 2 takes this flag and ignores it, weight gradients are in FP8 all "
        "the same; drop the flag"
    ): "--no-fp8-wgrad",
    "weight gradients are always in FP8; drop the flag": "--fp8-wgrad",
    (
        "scales are updated in every micro-batch, as Transformer Engine does since 1.8; drop "
        "the flag"
    ): "--fp8-interval",
    "only the recipes of --fp8-recipe are supported; drop the flag": "--fp8-quantizer-factory",
    "attention stays in bfloat16; drop the flag": (
        "--fp8-dot-product-attention --fp8-multi-head-attention"
    ),
    "FP8 parameters are not supported with --fp8-recipe mxfp8; drop the flag": (
        "--reuse-grad-buf-for-mxfp8-param-ag"
    ),
    "FP4 is not supported; write --fp8-format": (
        "--fp4-format --fp4-recipe --fp4-param-gather --fp4-quantizer-factory"
    ),
    (
        "dropout is a function of seed and iteration here, so no random state is stored; drop "
        "the flag"
    ): "--no-save-rng --no-load-rng",
    (
        "`evaluate` and `generate` always read the checkpoint's config.yaml; for `train` give "
        "--config RUN/config.yaml"
    ): "--use-checkpoint-args --use-mp-args-from-checkpoint-args",
    "checkpoints are always torch_dist, for any layout; drop the flag": (
        "--ckpt-format --use-dist-ckpt --dist-ckpt-format --auto-detect-ckpt-format "
        "--ckpt-convert-format --ckpt-convert-save --dist-ckpt-strictness "
        "--dist-ckpt-optim-fully-reshardable --ckpt-assume-constant-structure "
        "--ckpt-fully-parallel-load --no-ckpt-fully-parallel-save"
    ),
    "write --load DIR --finetune": "--pretrained-checkpoint",
    "write --save-interval": "--persistent-save-interval",
    "a writer lives as long as its checkpoint; write --async-save": (
        "--use-persistent-ckpt-worker"
    ),
    "local checkpoints are not available; write --async-save with --save-interval": (
        "--non-persistent-save-interval --non-persistent-ckpt-type "
        "--non-persistent-local-ckpt-dir --non-persistent-local-ckpt-algo --replication"
    ),
    "the order of the data is the plan's, for every number of ranks; drop the flag": (
        "--dataloader-type"
    ),
    "one thread reads ahead, and it keeps up; drop the flag": "--num-workers",
    "corpora are always memory-mapped; drop the flag": "--no-mmap-bin-files",
    "there is no mock data here; examples/quickstart has small real corpora": "--mock-data",
    "write --data-path with --split, or a curriculum file": (
        "--train-data-path --valid-data-path --test-data-path --data-args-path "
        "--per-split-data-args-path"
    ),
    "phases are the stages of the curriculum file; write --curriculum": (
        "--phase-transition-iterations"
    ),
    (
        "instruction data is a domain of the curriculum (`kind: instruct`); write --curriculum"
    ): "--sft --sft-tokenizer-prompt-format",
    "fill-in-the-middle is not supported; drop the flag": "--fim-data --fim-rate --fim-spm-rate",
    (
        "masks come from the document starts in the index, never from token ids; drop the flag"
    ): "--no-create-attention-mask-in-dataloader --allow-ambiguous-pad-tokens",
    "extend the tokenizer itself; drop the flag": (
        "--vocab-extra-ids --tokenizer-special-tokens --tiktoken-num-special-tokens"
    ),
    "the tokenizer's own file says it; drop the flag": "--tokenizer-metadata --tiktoken-pattern",
    "no code of a model hub is ever run; drop the flag": "--trust-remote-code",
    (
        "computed from the vocabulary, --make-vocab-size-divisible-by and the tensor-parallel "
        "size; drop the flag"
    ): "--padded-vocab-size",
    "choose a --global-batch-size that the micro-batches divide": (
        "--decrease-batch-size-if-needed"
    ),
    "one learning rate holds for all weights; drop the flag": ("--decoupled-lr --decoupled-min-lr"),
    "raise --eval-iters: a smaller validation set is read completely": "--full-validation",
    "every domain is always validated separately; drop the flag": "--multiple-validation-sets",
    "use `chatflow evaluate`": "--skip-train",
    "the rank comes from torchrun's or SLURM's environment; drop the flag": (
        "--local-rank --local_rank"
    ),
    "only TensorBoard and metrics.jsonl are written; drop the flag": (
        "--wandb-project --wandb-exp-name --wandb-save-dir --wandb-entity"
    ),
    "metrics.jsonl, TensorBoard and the console always hold all metrics; drop the flag": (
        "--log-progress --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard "
        "--log-world-size-to-tensorboard --tensorboard-queue-size --timing-log-level "
        "--timing-log-option --no-one-logger"
    ),
    "give --log-level with debug, info, warning or error": "--logging-level",
    "not measured here; drop the flag": (
        "--log-params-norm --log-num-zeros-in-grad --log-max-attention-logit "
        "--log-memory-to-tensorboard --log-memory-interval --log-energy --log-straggler "
        "--straggler-ctrlr-port --straggler-minmax-count"
    ),
    "run the command under a profiler of your choice; drop the flag": (
        "--profile --profile-step-start --profile-step-end --use-pytorch-profiler "
        "--record-memory-history"
    ),
    "loss spikes are always reported; drop the flag": "--check-for-spiky-loss",
    "the gradient norm is clipped and reported; drop the flag": "--check-for-large-grads",
    "at SIGTERM and SIGUSR1 the run always saves and exits; drop the flag": (
        "--exit-signal-handler --exit-signal --exit-signal-handler-for-dataloader"
    ),
    "error injection and in-process restarts are not supported; drop the flag": (
        "--rerun-mode --error-injection-rate --error-injection-type "
        "--result-rejected-tracker-filename --enable-ft-package --calc-ft-timeouts "
        "--inprocess-restart --adlr-autoresume"
    ),
    "FSDP is not supported; use --use-distributed-optimizer": (
        "--use-megatron-fsdp --use-torch-fsdp2 --data-parallel-sharding-strategy"
    ),
    "only megatron-core models exist here; drop the flag": "--use-legacy-models",
    "runs on a CPU are always bit-exact; on CUDA this is not available yet; drop the flag": (
        "--deterministic-mode"
    ),
}

REFUSED: dict[str, str] = {
    flag: message for message, flags in _GROUPS.items() for flag in flags.split()
}
"""{flag: why it is not supported, and what to do}."""
