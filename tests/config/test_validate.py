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
    resolve_data,
    resolve_model,
    total_samples,
)
from megatron_chatflow.errors import ChatflowError, ConfigErrors

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
            ["2 layers per pipeline stage", "3"],
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
def test_errors_name_both_settings_and_what_to_do(words: str, world: int, parts: list[str]) -> None:
    with pytest.raises(ConfigErrors) as error:
        read(words, world)
    assert all("\n" not in message for message in error.value.messages)
    for part in parts:
        assert part in str(error.value)


def messages(words: str, world_size: int = 1) -> list[str]:
    """Return what each message is about: its text up to the first semicolon."""
    with pytest.raises(ConfigErrors) as error:
        read(words, world_size)
    return [message.split(";")[0] for message in error.value.messages]


def test_all_independent_errors_are_reported_together() -> None:
    assert messages(
        "--hidden-size 65 --hidden-dropout 1 --global-batch-size 15 --min-lr 1 --log-interval 0 "
        "--lr-warmup-iters 10 --fp8-margin 1 --save-interval 0"
    ) == [
        "hidden_size 65 is not a multiple of num_attention_heads 4",
        "hidden_dropout is 1.0",
        "fp8_margin 1 has no effect without fp8_format",
        "min_lr 1.0 is larger than lr 0.001",
        "save_interval is 0",
        "log_interval is 0",
        "global_batch_size 15 is not a multiple of micro_batch_size 2 x data-parallel size 1",
    ]


def test_errors_that_follow_from_another_error_are_not_reported() -> None:
    # Neither the widths, nor the layout, nor the batches can be checked.
    assert messages("--num-attention-heads 0 --tensor-model-parallel-size 0") == [
        "num_attention_heads is missing",
        "tensor_model_parallel_size is missing",
    ]
    assert messages("--tensor-model-parallel-size 2 --global-batch-size 15") == [
        "1 process is not a multiple of tensor_model_parallel_size 2 x "
        "pipeline_model_parallel_size 1"
    ]


def test_only_the_sections_that_are_needed_are_checked() -> None:
    written = parse(make_parser("chatflow train", ""), BASE.split())[0]
    wrong = written.replace(lr=None, num_layers=0, pipeline_model_parallel_size=2)
    assert resolve_data(wrong).training.global_batch_size == 16
    without_length = written.replace(train_iters=None, lr=None)
    assert resolve_model(without_length, 1).model.kv_channels == 16


def test_resolution_is_idempotent() -> None:
    config = read("--swiglu --recompute-granularity selective")
    assert resolve(config, 1) == config


def test_the_schedule_counts_samples_as_megatron_does() -> None:
    config = read(
        "--lr-decay-style WSD --lr-wsd-decay-iters 3 --lr-warmup-fraction 0.25 --lr-decay-iters 8"
    )
    assert Schedule.of(config) == Schedule(warmup=32, decay=128, wsd=48, total=160)
    assert total_samples(config) == 160


@pytest.mark.parametrize(("name", "value"), [("train_samples", 10**30), ("train_iters", 10**16)])
def test_a_run_that_is_too_long_to_count_is_refused(name: str, value: int):
    config = Config().replace(**{"global_batch_size": 8, name: value})
    with pytest.raises(ChatflowError, match=f"{name}: a run of "):
        total_samples(config)
