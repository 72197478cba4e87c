"""Settings in, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.config import Config, load_values, make_parser, parse, to_yaml
from megatron_chatflow.config.loader import field_docs
from megatron_chatflow.config.schema import section_of, sections
from megatron_chatflow.config.schema.section import choices_of, type_hints
from megatron_chatflow.config.unsupported_flags import REFUSED
from megatron_chatflow.errors import ChatflowError


def read(*words: str) -> Config:
    return parse(make_parser("chatflow train", ""), words)[0]


def test_every_docstring_of_a_setting_ends_with_a_period() -> None:
    for _, cls in sections():
        docs = field_docs(cls)
        assert set(docs) == {f.name for f in dataclasses.fields(cls)}
        assert all(text.endswith(".") for text in docs.values())


def test_help_all_shows_every_flag_with_its_docstring() -> None:
    text = "".join(
        make_parser("chatflow train", "").format_help(everything=True).split()
    )  # argparse breaks lines at hyphens too
    for _, cls in sections():
        for name, doc in field_docs(cls).items():
            assert "".join(doc.split()) in text, name


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: {num_layers: 4, hidden_size: 64}\noptimizer: {lr: 1e-4}\n"
    )
    config = read("--config", str(tmp_path / "run.yaml"), "--num-layers", "8")
    assert (config.model.num_layers, config.model.hidden_size, config.optimizer.lr) == (8, 64, 1e-4)


def test_a_switch_of_the_file_can_be_turned_off_by_a_flag(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("training: {bf16: true}\nmodel: {add_bias_linear: true}\n")
    config = read("--config", str(tmp_path / "run.yaml"), "--no-bf16", "--disable-bias-linear")
    assert not config.training.bf16 and not config.model.add_bias_linear


def test_paths_of_the_file_are_relative_to_it_and_paths_of_flags_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.yaml").write_text(
        "data: {curriculum: c.yaml, data_path: [0.3, x]}\n".replace("0.3", '"0.3"')
    )
    monkeypatch.chdir(tmp_path)
    config = read("--config", "a/run.yaml", "--save", "out")
    assert config.data.curriculum == str(tmp_path / "a" / "c.yaml")
    assert config.data.data_path == ["0.3", str(tmp_path / "a" / "x")]
    assert config.checkpoint.save == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("modle: {}", ["unknown section 'modle'", "did you mean model?"]),
        ("num_layers: 4", ["num_layers", "belongs in the section model"]),
        ("model: {num_layer: 4}", ["unknown setting 'num_layer'", "did you mean num_layers?"]),
        ("model: {lr: 1}", ["unknown setting 'lr'", "section optimizer"]),
        ("model: {num_layers: four}", ["model.num_layers", "'four'", "an integer"]),
        ("model: {num_layers: 4.5}", ["model.num_layers", "4.5", "an integer"]),
        ("model: {num_layers: true}", ["model.num_layers", "True", "an integer"]),
        ("model: {num_layers: }", ["num_layers has no value"]),
        ("model: {swiglu: 1}", ["model.swiglu", "true or false"]),
        ("model: {normalization: RmsNorm}", ["RmsNorm", "did you mean RMSNorm?"]),
        ("optimizer: {lr: .nan}", ["optimizer.lr", "nan", "a number"]),
        ("training: {rampup_batch_size: 4}", ["rampup_batch_size", "a list of integers"]),
        ("model: 4", ["section model holds 4"]),
        ("[1]", ["holds list, not sections"]),
        ("a: [", ["not valid YAML", "line 1"]),
        ("training: {fp16: true}", ["fp16", "write --bf16"]),
    ],
)
def test_a_wrong_file_is_one_message_with_key_value_and_fix(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ChatflowError) as error:
        read("--config", str(path))
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--num-layer", "4"], ["unknown flag --num-layer", "--num-layers"]),
        (
            ["--learning-rate", "1"],
            ["unknown flag --learning-rate; `chatflow train --help-all` lists the flags"],
        ),
        (["--num-layers", "x"], ["--num-layers", "'x'", "an integer"]),
        (["--num-layers"], ["--num-layers"]),
        (["--fp16"], ["--fp16", "--bf16"]),
        (["--fp4-format=e2m1"], ["--fp4-format"]),
        (["file.yaml"], ["unexpected argument 'file.yaml'"]),
        (["--config", "none.yaml"], ["none.yaml", "cannot be read"]),
    ],
)
def test_a_wrong_flag_is_one_message_with_the_fix(words: list[str], parts: list[str]) -> None:
    with pytest.raises(ChatflowError) as error:
        read(*words)
    for part in parts:
        assert part in str(error.value)


def test_a_refused_flag_is_not_also_a_setting() -> None:
    flags = {
        option
        for action in make_parser("chatflow train", "")._actions
        for option in action.option_strings
    }
    assert not flags & set(REFUSED)


def _value(cls: type, name: str) -> st.SearchStrategy:
    (meta,) = (f.metadata for f in dataclasses.fields(cls) if f.name == name)
    hint = str(type_hints(cls)[name])
    if choices_of(cls, name):
        return st.sampled_from(choices_of(cls, name))
    if meta.get("path"):
        return st.just("/a/b c/d")
    if "list[int]" in hint:
        return st.lists(st.integers(0, 9), min_size=1)
    if "list[str]" in hint:
        return st.just(["0.5", "/x/a", "0.5", "/x/b"])
    if "bool" in hint:
        return st.booleans()
    if "float" in hint:
        return st.floats(0, 1e6, allow_nan=False)
    if "int" in hint:
        return st.integers(0, 10**12)
    return st.text("abc,.:#é中 ", min_size=1)


@settings(deadline=None)
@given(st.data())
def test_the_resolved_file_reads_back_to_the_same_settings(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    config = Config()
    for name, section in section_of().items():
        if data.draw(st.booleans()):
            value = data.draw(_value(type(getattr(config, section)), name))
            config = config.replace(**{name: value})
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    again = Config().replace(**load_values(path))
    assert again == config
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == {name for name, _ in sections()}


MEGATRON = """
--num-layers --hidden-size --num-attention-heads --ffn-hidden-size --kv-channels
--group-query-attention --num-query-groups --max-position-embeddings --position-embedding-type
--rotary-base --rotary-percent --use-rope-scaling --normalization --norm-epsilon --swiglu
--disable-bias-linear --untie-embeddings-and-output-weights --qk-layernorm
--make-vocab-size-divisible-by --attention-dropout --hidden-dropout --init-method-std
--transformer-impl --attention-backend --use-cpu-initialization --tensor-model-parallel-size
--pipeline-model-parallel-size --context-parallel-size --expert-model-parallel-size
--sequence-parallel --num-layers-per-virtual-pipeline-stage --use-distributed-optimizer
--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size --distributed-backend
--distributed-timeout-minutes --local-rank --use-tp-pp-dp-mapping --use-megatron-fsdp
--data-parallel-sharding-strategy --recompute-granularity --recompute-method --recompute-num-layers
--recompute-modules --micro-batch-size --global-batch-size --rampup-batch-size
--decrease-batch-size-if-needed --train-iters --train-samples --exit-interval
--exit-duration-in-mins --exit-signal-handler --exit-signal --exit-signal-handler-for-dataloader
--iterations-to-skip --manual-gc --manual-gc-interval --train-sync-interval
--check-weight-hash-across-dp-replicas-interval --no-check-for-nan-in-loss-and-grad
--check-for-spiky-loss --check-for-large-grads --empty-unused-memory-level --optimizer --seed
--deterministic-mode --calculate-per-token-loss --cross-entropy-loss-fusion --lr --min-lr
--lr-decay-style --lr-decay-iters --lr-decay-samples --lr-warmup-iters --lr-warmup-samples
--lr-warmup-fraction --lr-warmup-init --lr-wsd-decay-style --lr-wsd-decay-iters
--lr-wsd-decay-samples --weight-decay --start-weight-decay --end-weight-decay
--weight-decay-incr-style --decoupled-lr --decoupled-min-lr --override-opt_param-scheduler
--use-checkpoint-opt_param-scheduler --clip-grad --adam-beta1 --adam-beta2 --adam-eps --bf16 --fp16
--loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis
--accumulate-allreduce-grads-in-fp32 --grad-reduce-in-bf16 --fp8-format --fp8-recipe --save --load
--save-interval --persistent-save-interval --save-retain-interval --ckpt-step --finetune
--pretrained-checkpoint --no-load-optim --no-load-rng --no-save-optim --no-save-rng
--use-checkpoint-args --use-mp-args-from-checkpoint-args --exit-on-missing-checkpoint --ckpt-format
--auto-detect-ckpt-format --ckpt-convert-format --ckpt-convert-save --async-save --data-path --split
--train-data-path --valid-data-path --test-data-path --data-args-path --per-split-data-args-path
--data-cache-path --mock-data --seq-length --num-workers --dataloader-type
--num-dataset-builder-threads --no-mmap-bin-files --mid-level-dataset-surplus --reset-position-ids
--reset-attention-mask --eod-mask-loss --phase-transition-iterations --fim-data --sft --eval-iters
--eval-interval --skip-train --full-validation --multiple-validation-sets --tokenizer-type
--tokenizer-model --vocab-file --merge-file --vocab-size --padded-vocab-size --vocab-extra-ids
--trust-remote-code --log-interval --log-throughput --log-progress --log-params-norm
--log-num-zeros-in-grad --timing-log-level --tensorboard-dir --tensorboard-log-interval
--tensorboard-queue-size --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard
--log-memory-to-tensorboard --wandb-project --log-straggler --logging-level --no-one-logger
--profile --use-pytorch-profiler --rerun-mode --enable-ft-package --inprocess-restart
"""


def test_every_flag_that_megatrons_users_write_is_a_setting_or_is_refused() -> None:
    flags = {
        option
        for action in make_parser("chatflow train", "")._actions
        for option in action.option_strings
    }
    assert not [flag for flag in MEGATRON.split() if flag not in flags and flag not in REFUSED]
    assert all(message and not message.endswith(".") for message in REFUSED.values())
