"""Initial weights do not depend on the layout."""

from __future__ import annotations

import math

import pytest

from tests.pool import Pool

WORDS = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope "
    "--disable-bias-linear --untie-embeddings-and-output-weights --seq-length 16 "
    "--train-iters 1 --lr 1e-3 --global-batch-size 4"
)


def _statistics(extra: str) -> dict[str, tuple[float, float]]:
    import torch

    from megatron_chatflow.config import make_parser, parse, resolve
    from megatron_chatflow.distributed import process_groups
    from megatron_chatflow.distributed.launch import read_launch
    from megatron_chatflow.model.gpt import build_model
    from megatron_chatflow.planner.parameters import count_parameters

    launch = read_launch()
    config = resolve(
        parse(make_parser("chatflow train", ""), (WORDS + " " + extra).split())[0],
        launch.world_size,
    )
    process_groups.initialize(launch, config.parallel, 4)
    chunks = build_model(config, 256, "local", wrap=False)
    found = {
        name: (float(p.mean()), float(p.std()))
        for chunk in chunks
        for name, p in chunk.named_parameters()
    }
    if not extra:
        assert sum(p.numel() for p in chunks[0].parameters()) == count_parameters(config, 256)
        assert all(torch.isfinite(p).all() for p in chunks[0].parameters())
    process_groups.shut_down()
    return found


def test_weights_have_the_standard_deviations_that_were_asked_for(pool: Pool) -> None:
    found = pool.run(1, _statistics, "")[0]
    for name, (mean, std) in found.items():
        if name.endswith("norm.weight"):
            assert (mean, std) == (1.0, 0.0)
        else:
            wanted = (
                0.02 / math.sqrt(8)
                if name.endswith(("linear_proj.weight", "linear_fc2.weight"))
                else 0.02
            )
            assert abs(mean) < 0.1 * wanted and abs(std / wanted - 1) < 0.05, name


def _weights(extra: str) -> dict[str, object]:
    """Return this rank's shards: {(key, global offset): (local shape, prepended axes, values)}.

    tests/checkpoint covers saving them and loading complete tensors; here slices are compared.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from megatron_chatflow.config import make_parser, parse, resolve
    from megatron_chatflow.distributed import process_groups
    from megatron_chatflow.distributed.launch import read_launch
    from megatron_chatflow.model.gpt import build_model

    launch = read_launch()
    config = resolve(
        parse(make_parser("chatflow train", ""), (WORDS + " " + extra).split())[0],
        launch.world_size,
    )
    process_groups.initialize(launch, config.parallel, 4)
    parts = {}
    for chunk in build_model(config, 256, "local", wrap=False):
        for entry in chunk.sharded_state_dict().values():
            shards = (
                entry.build()
                if isinstance(entry, ShardedTensorFactory)
                else [entry]
                if isinstance(entry, ShardedTensor)
                else []
            )
            for shard in shards:
                parts[(shard.key, shard.global_offset)] = (
                    shard.local_shape,
                    shard.prepend_axis_num,
                    shard.data.detach().numpy().copy(),
                )
    process_groups.shut_down()
    return parts


@pytest.mark.slow
def test_every_layout_holds_slices_of_the_same_weights(pool: Pool) -> None:
    import numpy as np

    reference = {}
    for (key, offset), (_, lead, data) in pool.run(1, _weights, "")[0].items():
        reference.setdefault((key, offset[:lead]), []).append((offset[lead:], data))
    for world, extra in (
        (2, "--tensor-model-parallel-size 2"),
        (2, "--pipeline-model-parallel-size 2"),
        (
            4,
            (
                "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
                "--num-layers-per-virtual-pipeline-stage 1"
            ),
        ),
    ):
        for parts in pool.run(world, _weights, extra):
            for (key, offset), (_, lead, data) in parts.items():
                pieces = reference[(key, offset[:lead])]
                (origin, full) = max(
                    (
                        p
                        for p in pieces
                        if all(a <= b for a, b in zip(p[0], offset[lead:], strict=True))
                    ),
                    key=lambda p: p[0],
                )
                cut = tuple(
                    slice(b - a, b - a + n)
                    for a, b, n in zip(origin, offset[lead:], data.shape, strict=True)
                )
                assert np.array_equal(full[cut], data), (extra, key, offset)
