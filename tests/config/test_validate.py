"""What follows from the settings, and which of them contradict each other."""

from __future__ import annotations

import pytest

from megatron_chatflow.config import (
    Config,
    Schedule,
    make_parser,
    padded_vocab_size,
    parse,
    resolve,
    total_samples,
)
from megatron_chatflow.errors import ChatflowError

BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 "
    "--micro-batch-size 2 --global-batch-size 16 --train-iters 10 --lr 1e-3"
)


def read(words: str, world_size: int = 1) -> Config:
    return resolve(
        parse(make_parser("chatflow train", ""), (BASE + " " + words).split())[0], world_size
    )


def test_dependent_defaults_are_megatrons() -> None:
    model = read("").model
    assert (model.ffn_hidden_size, model.kv_channels, model.max_position_embeddings) == (
        256,
        16,
        128,
    )
    assert (
        read("--swiglu --hidden-size 4096 --num-attention-heads 32").model.ffn_hidden_size
        == int(4 * 4096 * 2 / 3) // 64 * 64
    )


def test_the_padded_vocabulary_is_the_same_for_every_power_of_two_of_tensor_parallelism() -> None:
    sizes = {
        padded_vocab_size(read(f"--tensor-model-parallel-size {tp}", tp), 8000) for tp in (1, 2, 4)
    }
    assert sizes == {8064}


@pytest.mark.parametrize(
    ("words", "world", "parts"),
    [
        ("--num-layers 0", 1, ["num_layers", "--num-layers"]),
        ("--hidden-size 65", 1, ["hidden_size 65", "num_attention_heads 4"]),
        ("--num-query-groups 2", 1, ["num_query_groups 2", "--group-query-attention"]),
        ("--group-query-attention", 1, ["--num-query-groups"]),
        (
            "--group-query-attention --num-query-groups 3",
            1,
            ["num_attention_heads 4", "num_query_groups 3"],
        ),
        (
            "--tensor-model-parallel-size 3",
            3,
            ["num_attention_heads 4", "tensor_model_parallel_size 3"],
        ),
        (
            "--tensor-model-parallel-size 3",
            1,
            ["num_attention_heads 4", "tensor_model_parallel_size 3"],
        ),
        (
            "--tensor-model-parallel-size 2",
            1,
            ["1 process is", "tensor_model_parallel_size 2", "--nproc-per-node 2"],
        ),
        (
            (
                "--num-attention-heads 12 --hidden-size 96 --group-query-attention "
                "--num-query-groups 4 --tensor-model-parallel-size 6"
            ),
            6,
            ["num_query_groups 4", "tensor_model_parallel_size 6"],
        ),
        (
            (
                "--hidden-size 4 --ffn-hidden-size 4 --group-query-attention --num-query-groups "
                "1 --tensor-model-parallel-size 4"
            ),
            4,
            ["x kv_channels is 6", "tensor_model_parallel_size 4"],
        ),
        ("--pipeline-model-parallel-size 3", 3, ["num_layers 4", "pipeline_model_parallel_size 3"]),
        (
            "--num-layers-per-virtual-pipeline-stage 1",
            1,
            ["num_layers_per_virtual_pipeline_stage", "pipeline_model_parallel_size 1"],
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
            2,
            ["2 layers a pipeline stage", "3"],
        ),
        (
            (
                "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
                "--global-batch-size 6"
            ),
            2,
            ["3 micro-batches", "pipeline_model_parallel_size 2"],
        ),
        ("--sequence-parallel", 1, ["sequence_parallel", "tensor_model_parallel_size 1"]),
        ("--global-batch-size 15", 1, ["global_batch_size 15", "micro_batch_size 2"]),
        ("--global-batch-size 10", 4, ["global_batch_size 10", "data-parallel size 4"]),
        ("--train-samples 100", 1, ["train_iters", "train_samples"]),
        ("--train-iters 0", 1, ["0 long"]),
        ("--rampup-batch-size 4 4 100", 1, ["rampup_batch_size", "--train-samples"]),
        ("--min-lr 1", 1, ["min_lr 1.0", "lr 0.001"]),
        ("--lr-warmup-iters 10", 1, ["warm-up of 160 samples", "decay of 160"]),
        ("--lr-decay-style WSD", 1, ["--lr-wsd-decay-iters"]),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 11", 1, ["176 samples", "160"]),
        ("--weight-decay-incr-style linear", 1, ["start_weight_decay", "end_weight_decay"]),
        (
            "--seq-length 256 --max-position-embeddings 128",
            1,
            ["seq_length 256", "max_position_embeddings 128"],
        ),
        ("--hidden-dropout 1", 1, ["hidden_dropout is 1.0"]),
        ("--overlap-param-gather", 1, ["--use-distributed-optimizer"]),
        ("--ddp-bucket-size 1000", 1, ["ddp_bucket_size", "--overlap-grad-reduce"]),
        ("--ddp-bucket-size 0 --overlap-grad-reduce", 1, ["ddp_bucket_size: 0", "positive"]),
        ("--log-interval 0", 1, ["log_interval is 0"]),
        ("--optimizer sgd --use-distributed-optimizer", 1, ["sgd", "--use-distributed-optimizer"]),
        ("--clip-grad -1", 1, ["clip_grad is -1.0"]),
        (
            "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler",
            1,
            ["override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"],
        ),
    ],
)
def test_contradictions_are_refused_with_both_settings_and_the_cure(
    words: str, world: int, parts: list[str]
) -> None:
    with pytest.raises(ChatflowError) as error:
        read(words, world)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_the_schedule_counts_samples_as_megatron_does() -> None:
    config = read(
        "--lr-decay-style WSD --lr-wsd-decay-iters 3 --lr-warmup-fraction 0.25 --lr-decay-iters 8"
    )
    assert Schedule.of(config) == Schedule(warmup=32, decay=128, wsd=48, total=160)
    assert total_samples(config) == 160


@pytest.mark.parametrize(("name", "value"), [("train_samples", 10**30), ("train_iters", 10**16)])
def test_a_run_that_is_too_long_to_count_is_refused(name: str, value: int):
    config = Config()
    config.training.global_batch_size = 8
    setattr(config.training, name, value)
    with pytest.raises(ChatflowError, match=f"{name}: a run of "):
        total_samples(config)
