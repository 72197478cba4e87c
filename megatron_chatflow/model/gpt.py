"""Build megatron-core's TransformerConfig and the model chunks of this rank."""

from __future__ import annotations

import functools

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_chatflow.config import ModelConfig, padded_vocab_size
from megatron_chatflow.config.pipeline_layout import virtual_pipeline_size
from megatron_chatflow.config.schema import PrecisionSettings
from megatron_chatflow.distributed import cuda_shim
from megatron_chatflow.distributed.kernels import gradient_accumulation_reason
from megatron_chatflow.fp8.context import Fp8Context, delayed_scaling
from megatron_chatflow.fp8.transformer_engine import forget_validation
from megatron_chatflow.model import fused
from megatron_chatflow.model.init import initialize_weights
from megatron_chatflow.model.spec import block_spec


def transformer_config(config: ModelConfig, transformer_impl: str) -> TransformerConfig:
    """Return megatron-core's configuration of the model.

    The fused CUDA kernels that Megatron-LM turns on by default are on for Transformer Engine's
    layers, and off without CUDA (`distributed/cuda_shim.py`); the portable layers have their own
    (`model/fused.py`). FP8 is in it for Transformer Engine's layers only, because megatron-core
    expects these layers wherever it is set.
    """
    model, parallel, training = config.model, config.parallel, config.training
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    virtual = virtual_pipeline_size(parallel, model.num_layers)
    interleaved = virtual > 1
    rope = model.position_embedding_type == "rope"
    portable = transformer_impl == "local"
    if portable:
        fused.install()
    cuda_kernels = not portable and not cuda_shim.is_needed()
    fp8 = PrecisionSettings() if portable else config.precision
    # `initialize_weights` draws all weights on the CPU, so megatron-core's initializers do nothing.
    on_cpu = training.use_cpu_initialization or cuda_shim.is_needed()
    initializer = _unchanged if on_cpu else None
    return TransformerConfig(
        # The shape of the model.
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.key_value_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_layernorm,
        gated_linear_unit=model.swiglu,
        activation_func=torch.nn.functional.silu if model.swiglu else torch.nn.functional.gelu,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        # Initial weights.
        init_method_std=model.init_method_std,
        use_cpu_initialization=on_cpu,
        init_method=initializer,
        output_layer_init_method=initializer,
        embedding_init_method=initializer,
        # The layout.
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if interleaved else None,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=parallel.account_for_loss_in_pipeline_split,
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
        sequence_parallel=parallel.sequence_parallel,
        # Two messages between the same two ranks in one batch get mixed up over gloo when PP is 2,
        # so the interleaved schedule sends them one at a time.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Precision.
        bf16=training.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        attention_softmax_in_fp32=True,
        calculate_per_token_loss=True,
        fp8=fp8.fp8_format,
        fp8_recipe=fp8.fp8_recipe,
        fp8_margin=fp8.fp8_margin,
        fp8_amax_history_len=fp8.fp8_amax_history_len,
        fp8_amax_compute_algo=fp8.fp8_amax_compute_algo,
        fp8_param=fp8.fp8_param_gather,
        tp_only_amax_red=fp8.tp_only_amax_red,
        first_last_layers_bf16=fp8.first_last_layers_bf16,
        num_layers_at_start_in_bf16=fp8.num_layers_at_start_in_bf16,
        num_layers_at_end_in_bf16=fp8.num_layers_at_end_in_bf16,
        # Recomputation.
        recompute_granularity=training.recompute_granularity,
        recompute_method=training.recompute_method,
        recompute_num_layers=training.recompute_num_layers,
        recompute_modules=training.recompute_modules,
        # Fused kernels.
        bias_activation_fusion=cuda_kernels and (model.swiglu or model.add_bias_linear),
        bias_dropout_fusion=cuda_kernels,
        gradient_accumulation_fusion=cuda_kernels and gradient_accumulation_reason() is None,
        apply_rope_fusion=rope and (portable or cuda_kernels),
        use_te_activation_func=portable and model.swiglu,
        cross_entropy_loss_fusion=portable,
        cross_entropy_fusion_impl="te" if portable else "native",
    )


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _mask_padding(
    vocab_size: int,
    padded: int,
    layer: torch.nn.Module,
    inputs: object,
    output: tuple[torch.Tensor, torch.Tensor | None],
) -> None:
    """Give the padding of the vocabulary a probability of exactly 0.

    No loss, gradient or sample then depends on it. The logit is the lowest finite number, not
    -infinity, because a rank may have no other column.
    """
    # logits: [s, b, columns of this rank]. `.data`: in place, also in a view, and not seen by
    # autograd; the gradient of these columns is 0 anyway.
    logits = output[0].data
    rank = parallel_state.get_tensor_model_parallel_rank()
    first = rank * logits.shape[-1] if logits.shape[-1] < padded else 0
    logits[..., max(0, vocab_size - first) :] = torch.finfo(logits.dtype).min


def build_chunk(
    config: ModelConfig,
    core: TransformerConfig,
    vocab_size: int,
    transformer_impl: str,
    vp_stage: int | None,
    fp8_context: Fp8Context | None,
) -> MegatronModule:
    """Return one model chunk with its initial weights, in the run's precision.

    It is not yet wrapped for data parallelism. `fp8_context` is that of the FP8 reference, if it is
    used.
    """
    ignore_virtual = vp_stage is None
    padded = padded_vocab_size(config, vocab_size)
    model = GPTModel(
        core,
        # megatron-core takes the spec of a block, too.
        block_spec(  # pyright: ignore[reportArgumentType]
            core, transformer_impl, vp_stage, config.precision, fp8_context
        ),
        padded,
        config.model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual, vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual, vp_stage),
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
        position_embedding_type=config.model.position_embedding_type,
        rotary_percent=config.model.rotary_percent,
        rotary_base=config.model.rotary_base,
        rope_scaling=config.model.use_rope_scaling,
        rope_scaling_factor=config.model.rope_scaling_factor,
        seq_len_interpolation_factor=config.model.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
    )
    if model.post_process and padded > vocab_size:
        model.output_layer.register_forward_hook(
            functools.partial(_mask_padding, vocab_size, model.vocab_size)
        )
    if fp8_context is not None:
        fp8_context.watch(model.decoder)
    elif config.precision.fp8_recipe == "delayed" and core.fp8:
        forget_validation(model.decoder)
    if core.use_cpu_initialization:
        initialize_weights(model, config.training.seed, config.model.init_method_std, vocab_size)
    model.cuda(torch.cuda.current_device())
    return Float16Module(core, model) if config.training.bf16 else model


def build_model(
    config: ModelConfig, vocab_size: int, transformer_impl: str, *, wrap: bool = True
) -> list[MegatronModule]:
    """Return the model chunks of this rank: one, or several with the interleaved schedule.

    Args:
        config: resolved settings; the process groups are initialized with them.
        vocab_size: size before padding.
        transformer_impl: "transformer_engine" or "local".
        wrap: whether to wrap for data parallelism (gradient buffers), as training needs.
    """
    core = transformer_config(config, transformer_impl)
    in_reference = config.precision.fp8_format is not None and transformer_impl == "local"
    delayed = delayed_scaling(config.precision) if in_reference else None
    virtual = core.virtual_pipeline_model_parallel_size
    stages = list(range(virtual)) if virtual else [None]
    fp8_contexts = [Fp8Context(config.precision, delayed) if in_reference else None for _ in stages]
    chunks = [
        build_chunk(config, core, vocab_size, transformer_impl, stage, fp8_context)
        for stage, fp8_context in zip(stages, fp8_contexts, strict=True)
    ]
    if not wrap:
        return chunks
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.training.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        bucket_size=config.parallel.ddp_bucket_size,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        fp8_param_gather=config.precision.fp8_param_gather,
    )
    return [
        DistributedDataParallel(core, ddp, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
