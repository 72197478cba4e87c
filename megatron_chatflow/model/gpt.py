"""From settings to megatron-core's TransformerConfig and to the model chunks of this rank."""

from __future__ import annotations

import functools

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_chatflow.config import Config, padded_vocab_size
from megatron_chatflow.config.pipeline_layout import virtual_pipeline_size
from megatron_chatflow.distributed import cuda_shim
from megatron_chatflow.distributed.kernels import gradient_accumulation_reason
from megatron_chatflow.fp8.context import Scope, delayed_scaling
from megatron_chatflow.fp8.recipe import transformer_settings
from megatron_chatflow.fp8.transformer_engine import forget_validation
from megatron_chatflow.model import fused
from megatron_chatflow.model.init import initialize_weights
from megatron_chatflow.model.spec import block_spec


def transformer_config(config: Config, transformer_impl: str) -> TransformerConfig:
    """megatron-core's configuration for resolved settings; on a CPU the fused CUDA kernels are off
    (`engine.cpu`).

    FP8 stands in it for Transformer Engine's layers only: megatron-core takes it for their
    presence.
    """
    model, parallel, training = config.model, config.parallel, config.training
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    virtual = virtual_pipeline_size(parallel, model.num_layers)
    interleaved = virtual > 1
    settings = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups
        if model.group_query_attention
        else model.num_attention_heads,
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
        init_method_std=model.init_method_std,
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
        # so the interleaved schedule sends one by one.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        bf16=training.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,
        attention_softmax_in_fp32=True,
        use_cpu_initialization=training.use_cpu_initialization,
        recompute_granularity=training.recompute_granularity,
        recompute_method=training.recompute_method,
        recompute_num_layers=training.recompute_num_layers,
        recompute_modules=training.recompute_modules,
    )
    if transformer_impl == "transformer_engine":
        settings |= transformer_settings(config.precision) | _cuda_kernels(config)
    if cuda_shim.is_needed():
        settings |= cuda_shim.TRANSFORMER_SETTINGS
    if transformer_impl == "local":
        settings |= fused.settings(
            swiglu=model.swiglu, rope=model.position_embedding_type == "rope"
        )
    if settings["use_cpu_initialization"]:  # `initialize_weights` draws them all
        settings |= dict.fromkeys(
            ("init_method", "output_layer_init_method", "embedding_init_method"), _leave
        )
    return TransformerConfig(**settings)


def _cuda_kernels(config: Config) -> dict[str, bool]:
    """The fused kernels that Megatron-LM turns on by default."""
    model = config.model
    return {
        "bias_activation_fusion": model.swiglu or model.add_bias_linear,
        "bias_dropout_fusion": True,
        "apply_rope_fusion": model.position_embedding_type == "rope",
        "gradient_accumulation_fusion": gradient_accumulation_reason() is None,
    }


def _leave(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _mask_padding(
    vocab_size: int,
    padded: int,
    layer: torch.nn.Module,
    inputs: object,
    output: tuple[torch.Tensor, torch.Tensor | None],
) -> None:
    """Give the columns of `output`'s logits that are padding of the vocabulary a probability of
    exactly 0, so that no loss, gradient or sample depends on them: the lowest finite number, as a
    rank may have no other column.
    """
    logits = output[
        0
        # in place, also in a view, and not seen by autograd: the gradient of these columns is 0
        # anyway
    ].data
    first = (
        parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        if logits.shape[-1] < padded
        else 0
    )
    logits[..., max(0, vocab_size - first) :] = torch.finfo(logits.dtype).min


def build_chunk(
    config: Config,
    core: TransformerConfig,
    vocab_size: int,
    transformer_impl: str,
    vp_stage: int | None,
    scope: Scope | None,
) -> MegatronModule:
    """One model chunk, with its initial weights, in the run's precision, not yet wrapped for data
    parallelism.
    """
    where = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    model = GPTModel(
        core,
        block_spec(core, transformer_impl, vp_stage, config.precision, scope),
        padded_vocab_size(config, vocab_size),
        config.model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
        position_embedding_type=config.model.position_embedding_type,
        rotary_percent=config.model.rotary_percent,
        rotary_base=config.model.rotary_base,
        rope_scaling=config.model.use_rope_scaling,
        rope_scaling_factor=config.model.rope_scaling_factor,
        seq_len_interpolation_factor=config.model.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
    )
    if model.post_process and padded_vocab_size(config, vocab_size) > vocab_size:
        model.output_layer.register_forward_hook(
            functools.partial(_mask_padding, vocab_size, model.vocab_size)
        )
    if scope is not None:
        scope.watch(model.decoder)
    elif config.precision.fp8_recipe == "delayed" and core.fp8:
        forget_validation(model.decoder)
    if core.use_cpu_initialization:
        initialize_weights(model, config.training.seed, config.model.init_method_std, vocab_size)
    model.cuda(torch.cuda.current_device())
    return Float16Module(core, model) if config.training.bf16 else model


def build_model(
    config: Config, vocab_size: int, transformer_impl: str, *, wrap: bool = True
) -> list[MegatronModule]:
    """The model chunks of this rank (one, but for the interleaved pipeline); with `wrap`, ready for
    training.

    Args:
        config: resolved settings; the process groups are initialised with them.
        vocab_size: size before padding.
        transformer_impl: "transformer_engine" or "local".
        wrap: whether to wrap for data parallelism (gradient buffers), as training needs.
    """
    core = transformer_config(config, transformer_impl)
    in_reference = config.precision.fp8_format is not None and transformer_impl == "local"
    delayed = delayed_scaling(config.precision) if in_reference else None
    stages = (
        range(core.virtual_pipeline_model_parallel_size)
        if core.virtual_pipeline_model_parallel_size
        else [None]
    )
    scopes = [Scope(config.precision, delayed) if in_reference else None for _ in stages]
    chunks = [
        build_chunk(config, core, vocab_size, transformer_impl, stage, scope)
        for stage, scope in zip(stages, scopes, strict=True)
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


def count_parameters(config: Config, vocab_size: int) -> int:
    """Parameters of the whole model, padding rows of the vocabulary left out (closed form)."""
    m = config.model
    h, heads = m.hidden_size, m.num_attention_heads * m.kv_channels
    groups = (m.num_query_groups or m.num_attention_heads) * m.kv_channels
    norm = h * (2 if m.normalization == "LayerNorm" else 1)
    head_norm = m.kv_channels * (2 if m.normalization == "LayerNorm" else 1)
    qkv, fc1 = heads + 2 * groups, m.ffn_hidden_size * (2 if m.swiglu else 1)
    layer = (
        h * qkv
        + heads * h
        + h * fc1
        + m.ffn_hidden_size * h
        + 2 * norm
        + (2 * head_norm if m.qk_layernorm else 0)
    )
    if m.add_bias_linear:
        layer += qkv + h + fc1 + h
    elif m.add_qkv_bias:
        layer += qkv
    embedding = vocab_size * h * (2 if m.untie_embeddings_and_output_weights else 1)
    positions = (
        m.max_position_embeddings * h if m.position_embedding_type == "learned_absolute" else 0
    )
    return m.num_layers * layer + norm + embedding + positions


def flops_per_token(config: Config, vocab_size: int) -> float:
    """Floating-point operations to train on one token: 6 a matrix parameter and 12 x seq_length x
    head width a layer for attention.

    Counted as Megatron does: full (not halved) causal attention, the padded output layer, no
    recomputation.
    """
    m = config.model
    heads, groups = (
        m.num_attention_heads * m.kv_channels,
        (m.num_query_groups or m.num_attention_heads) * m.kv_channels,
    )
    matrices = m.hidden_size * (2 * heads + 2 * groups + m.ffn_hidden_size * (3 if m.swiglu else 2))
    return (
        6.0 * (m.num_layers * matrices + padded_vocab_size(config, vocab_size) * m.hidden_size)
        + 12.0 * m.num_layers * config.data.seq_length * heads
    )
