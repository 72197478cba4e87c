"""The section ``model``: the shape of the GPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_chatflow.config.schema.section import Section, convert_to, flag_name, switch_field


@dataclass(frozen=True)
class ModelSettings(Section):
    """The shape of the GPT."""

    _positive = ("num_layers", "hidden_size", "num_attention_heads")

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
    """Maximum sequence length of the model; seq_length by default. Sizes the table of
    learned_absolute positions.
    """
    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute"
    """Position embedding: a learned table (GPT-2), rotary embeddings (LLaMA), or none."""
    rotary_base: int = 10000
    """Base (theta) of the rotary embeddings."""
    rotary_percent: float = 1.0
    """Fraction of each head that is rotated."""
    use_rope_scaling: bool = False
    """Scale the rotary frequencies as LLaMA 3.1 does."""
    rope_scaling_factor: float = 8.0
    """Factor of --use-rope-scaling."""
    rotary_seq_len_interpolation_factor: float | None = None
    """Divide positions by this (linear RoPE scaling); off by default."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Norm before attention, before the feed-forward layer and at the end."""
    norm_epsilon: float = 1e-5
    """Epsilon of the norms."""
    swiglu: bool = False
    """SiLU-gated feed-forward layer (LLaMA) instead of GELU."""
    add_bias_linear: bool = switch_field(off="--disable-bias-linear")
    """Biases in the linear layers; LLaMA has none."""
    add_qkv_bias: bool = False
    """A bias in the query, key and value projection only (Qwen2)."""
    qk_layernorm: bool = False
    """Normalize queries and keys in each head."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own weights instead of those of the input embedding."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this and of the tensor-parallel size; the padding is
    masked out of the softmax.
    """
    attention_dropout: float = 0.1
    """Dropout on attention probabilities."""
    hidden_dropout: float = 0.1
    """Dropout on the output of attention and of the feed-forward layer, and on the embedding."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; for the two output projections of a layer it is
    divided by sqrt(2 x num_layers).
    """
    transformer_impl: Literal["transformer_engine", "local"] | None = None
    """Layers of Transformer Engine, or the portable ones in plain torch; by default Transformer
    Engine where CUDA and the library are available.
    """

    @property
    def key_value_heads(self) -> int:
        """Number of key and value heads: those of the queries without grouped-query attention."""
        return self.num_query_groups or self.num_attention_heads

    def validate(self) -> list[str]:
        """Return what is wrong with this section alone, one message per error."""
        return [*super().validate(), *self._width_errors(), *self._other_errors()]

    def resolve(self, seq_length: int) -> ResolvedModelSettings:
        """Fill in the sizes that follow from others."""
        ffn = self.ffn_hidden_size
        if ffn is None:
            width = 4 * self.hidden_size
            ffn = int(width * 2 / 3) // 64 * 64 if self.swiglu else width
        return convert_to(
            ResolvedModelSettings,
            self,
            ffn_hidden_size=ffn,
            kv_channels=self.kv_channels or self.hidden_size // max(1, self.num_attention_heads),
            max_position_embeddings=self.max_position_embeddings or seq_length,
        )

    def _width_errors(self) -> list[str]:
        hidden, heads, errors = self.hidden_size, self.num_attention_heads, []
        if heads > 0 and hidden % heads and not self.kv_channels:
            errors.append(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; "
                "change one of them or give --kv-channels"
            )
        ffn = self.resolve(0).ffn_hidden_size
        if hidden > 0 and ffn == 0:
            errors.append(
                f"ffn_hidden_size is {ffn} for hidden_size {hidden}; give "
                "--ffn-hidden-size a positive number"
            )
        groups = self.num_query_groups
        if groups and not self.group_query_attention:
            errors.append(
                f"num_query_groups {groups} has no effect without group_query_attention; add "
                "--group-query-attention or drop --num-query-groups"
            )
        elif self.group_query_attention and not groups:
            errors.append("group_query_attention needs num_query_groups; add --num-query-groups N")
        elif groups and heads % groups:
            errors.append(
                f"num_attention_heads {heads} is not a multiple of num_query_groups {groups}; "
                "change one of them"
            )
        return errors

    def _other_errors(self) -> list[str]:
        errors = []
        if self.rotary_seq_len_interpolation_factor == 0:
            errors.append(
                "rotary_seq_len_interpolation_factor is 0; give "
                "--rotary-seq-len-interpolation-factor a positive number or leave it out"
            )
        for name in ("attention_dropout", "hidden_dropout"):
            if getattr(self, name) >= 1:
                errors.append(
                    f"{name} is {getattr(self, name)}; give {flag_name(name)} a number from 0 up "
                    "to, not including, 1"
                )
        if self.make_vocab_size_divisible_by == 0:
            errors.append(
                "make_vocab_size_divisible_by is 0; give --make-vocab-size-divisible-by a "
                "positive number"
            )
        return errors


@dataclass(frozen=True)
class ResolvedModelSettings(ModelSettings):
    """The shape of the GPT with every size known."""

    ffn_hidden_size: int = 0
    kv_channels: int = 0
    max_position_embeddings: int = 0
