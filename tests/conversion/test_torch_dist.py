"""The checkpoint format, written and read in pieces."""

from __future__ import annotations

from pathlib import Path

from tests.pool import Pool


def _written_alive(folder: str) -> tuple[int, int, list[str]]:
    """Write a model of 12 layers; returns how many pieces there were, how many tensors were alive
    at most, and the order of the first.
    """
    import weakref

    import torch

    from megatron_chatflow.config import Config
    from megatron_chatflow.config.schema import ModelSettings
    from megatron_chatflow.conversion.torch_dist import Piece, describe, write

    config = Config(
        model=ModelSettings(
            num_layers=12, hidden_size=16, num_attention_heads=2, kv_channels=8,
            ffn_hidden_size=32, max_position_embeddings=8,
            normalization="RMSNorm", position_embedding_type="rope", swiglu=True,
            add_bias_linear=False, untie_embeddings_and_output_weights=True,
        )
    )  # fmt: skip
    contents = describe(config, 100)
    alive: list[weakref.ref] = []
    order: list[str] = []
    most = 0

    def make(piece: Piece) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        order.append(f"{piece.layer} {piece.key}")
        storage = torch.zeros(piece.shape)
        alive.append(weakref.ref(storage.untyped_storage()))
        return storage

    write(Path(folder), contents, dict.fromkeys(contents.shapes, torch.float32), make)
    return len(order), most, order


def test_tensors_are_asked_for_one_by_one_and_layer_by_layer(pool: Pool, tmp_path: Path) -> None:
    ((count, most, order),) = pool.run(1, _written_alive, str(tmp_path))
    assert count == 12 * 6 + 3
    assert most <= 9  # the last of each of the nine keys
    assert (
        order[0] == "None embedding.word_embeddings.weight"
        and order[-1] == "None output_layer.weight"
    )
    assert [int(line.split()[0]) for line in order[1:-2]] == [
        layer for layer in range(12) for _ in range(6)
    ]


def _keys(folder: str) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """{key: (shape, type)} of a checkpoint of `train`, and what `describe` says of the same
    settings.
    """
    from torch.distributed.checkpoint import FileSystemReader

    from megatron_chatflow.checkpoint.run_directory import find_checkpoint
    from megatron_chatflow.config import Config, load_values
    from megatron_chatflow.conversion.torch_dist import describe

    config = Config().replace(**load_values(Path(folder) / "config.yaml"))
    contents = describe(config, 4096)
    saved = FileSystemReader(find_checkpoint(folder, None)).read_metadata().state_dict_metadata
    there = {key: tuple(getattr(entry, "size", ())) for key, entry in saved.items()}
    described = {key: tuple(shape) for key, shape in contents.shapes.items()} | dict.fromkeys(
        contents.objects, ()
    )
    model = {key: shape for key, shape in there.items() if not key.startswith("optimizer.")}
    return model, described


def test_what_is_written_is_what_train_saves(pool: Pool, reference: Path) -> None:
    ((there, described),) = pool.run(1, _keys, str(reference))
    assert there == described
