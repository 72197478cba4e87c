"""The portable attention against megatron-core's own and against documents run one by one."""

from __future__ import annotations

from typing import Any

from tests.pool import Pool


def _single(body: Any) -> Any:
    from megatron_chatflow.config.schema import ParallelSettings
    from megatron_chatflow.distributed import process_groups
    from megatron_chatflow.distributed.launch import read_launch

    process_groups.initialize(read_launch(), ParallelSettings(), 1)
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)
    try:
        return body()
    finally:
        process_groups.shut_down()


def _against_megatron() -> float:
    import torch
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_chatflow.model.attention import PortableAttention
    from megatron_chatflow.model.segments import attention_arguments

    def body() -> float:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=64,
            num_attention_heads=4,
            num_query_groups=2,
            attention_dropout=0.0,
            masked_softmax_fusion=False,
        )
        where = {
            "config": config,
            "layer_number": 1,
            "attn_mask_type": AttnMaskType.arbitrary,
            "attention_type": "self",
        }
        ours, theirs = PortableAttention(**where), DotProductAttention(**where)
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(12, 3, 4, 16, generator=generator)
        k, v = torch.randn(2, 12, 3, 2, 16, generator=generator)
        segments = torch.tensor([[0] * 12, [0] * 5 + [1] * 7, [0] * 1 + [1] * 10 + [2]])
        mask = attention_arguments(segments, False)["attention_mask"]
        return float((ours(q, k, v, mask) - theirs(q, k, v, mask)).abs().max())

    return _single(body)


def test_it_equals_megatron_cores_attention_under_a_packing_mask(pool: Pool) -> None:
    assert pool.run(1, _against_megatron)[0] < 2e-6


def _packed_against_separate(position_embedding_type: str) -> float:
    import torch

    from megatron_chatflow.config import make_parser, parse, resolve
    from megatron_chatflow.model.gpt import build_model
    from megatron_chatflow.model.segments import attention_arguments

    words = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 "
        "--train-iters 1 --lr 1e-3 --attention-dropout 0 --hidden-dropout 0 "
        f"--position-embedding-type {position_embedding_type}"
    )

    def body() -> float:
        config = resolve(parse(make_parser("chatflow train", ""), words.split())[0], 1)
        (model,) = build_model(config, 100, "local", wrap=False)
        tokens = torch.randint(0, 100, (1, 16), generator=torch.Generator().manual_seed(0))
        lengths = [5, 1, 10]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
        with torch.no_grad():
            together = model(
                tokens, positions, attention_arguments(segments, False)["attention_mask"]
            )
            apart = torch.cat(
                [
                    model(part, torch.arange(part.shape[1])[None], None)
                    for part in tokens.split(lengths, 1)
                ],
                1,
            )
        return float((together - apart).abs().max())

    return _single(body)


def test_packed_documents_get_the_logits_they_would_get_alone(pool: Pool) -> None:
    for kind in ("rope", "learned_absolute"):
        assert pool.run(1, _packed_against_separate, kind)[0] < 1e-5, kind


def test_packed_sequences_for_transformer_engine_name_every_boundary() -> None:
    import torch

    from megatron_chatflow.model.segments import attention_arguments

    packed = attention_arguments(torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 2]]), True)[
        "packed_seq_params"
    ]
    assert packed.cu_seqlens_q.tolist() == [0, 2, 4, 8, 9, 10, 12]
    assert (packed.qkv_format, packed.max_seqlen_q) == ("thd", 4)
