"""Every setting has a class that says what a change of it does at resume, and does that."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_chatflow.config import Config, Schedule, make_parser, parse, resolve
from megatron_chatflow.config.resume_policy import (
    AT_RESUME,
    COMPARED_AS,
    AtResume,
    kind_of,
    resume_table,
    training_settings,
)
from megatron_chatflow.config.schema import section_of
from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.training.data_setup import Inputs, open_inputs
from megatron_chatflow.training.resume_point import ResumePoint, resolve_resume_point
from megatron_chatflow.training.resume_settings import check_optimizer_group, settings_to_save
from tests.sample import SETTINGS

OVERRIDE = "--override-opt_param-scheduler"
USE_CHECKPOINT = "--use-checkpoint-opt_param-scheduler"
DOCS = Path(__file__).parents[2] / "docs" / "training.md"

WSD = "--lr-decay-style WSD --lr-wsd-decay-iters 6"
GROWING = "--weight-decay-incr-style linear --start-weight-decay 0.1 --end-weight-decay 0.2"
FP8 = "--bf16 --fp8-format hybrid"
TENSORWISE = f"{FP8} --fp8-recipe tensorwise"
EDGES = f"{TENSORWISE} --first-last-layers-bf16"
CHANGES: dict[str, str | tuple[str, str]] = {
    "num_layers": "--num-layers 3",
    "hidden_size": "--hidden-size 64 --kv-channels 12",
    "num_attention_heads": "--num-attention-heads 2 --kv-channels 12",
    "ffn_hidden_size": "--ffn-hidden-size 128",
    "kv_channels": "--kv-channels 16",
    "group_query_attention": "--no-group-query-attention --num-query-groups 0",
    "num_query_groups": "--num-query-groups 1",
    "max_position_embeddings": (
        "--position-embedding-type learned_absolute",
        "--max-position-embeddings 128",
    ),
    "position_embedding_type": "--position-embedding-type none",
    "rotary_percent": "--rotary-percent 0.5",
    "normalization": "--normalization LayerNorm",
    "norm_epsilon": "--norm-epsilon 1e-6",
    "swiglu": "--no-swiglu",
    "add_bias_linear": "--add-bias-linear",
    "add_qkv_bias": "--add-qkv-bias",
    "qk_layernorm": "--qk-layernorm",
    "untie_embeddings_and_output_weights": "--no-untie-embeddings-and-output-weights",
    "vocab_size": "--vocab-size 8192",
    "rotary_base": "--rotary-base 500000",
    "use_rope_scaling": "--use-rope-scaling",
    "rope_scaling_factor": ("--use-rope-scaling", "--rope-scaling-factor 4"),
    "rotary_seq_len_interpolation_factor": "--rotary-seq-len-interpolation-factor 2",
    "seed": "--seed 5",
    "seq_length": "--seq-length 32",
    "split": "--split 950,50,0",
    "tokenizer_type": "--tokenizer-type ByteLevelTokenizer --vocab-size 4096",
    "tokenizer_model": "--tokenizer-model OTHER",
    "optimizer": "--optimizer sgd",
    "lr": "--lr 4e-3",
    "min_lr": "--min-lr 5e-4",
    "lr_decay_style": "--lr-decay-style linear",
    "lr_decay_iters": "--lr-decay-iters 15",
    "lr_decay_samples": "--lr-decay-samples 100",
    "lr_warmup_iters": "--lr-warmup-iters 3",
    "lr_warmup_samples": "--lr-warmup-iters 0 --lr-warmup-samples 8",
    "lr_warmup_fraction": "--lr-warmup-iters 0 --lr-warmup-fraction 0.2",
    "lr_warmup_init": "--lr-warmup-init 1e-5",
    "lr_wsd_decay_style": (WSD, "--lr-wsd-decay-style linear"),
    "lr_wsd_decay_iters": (WSD, "--lr-wsd-decay-iters 5"),
    "lr_wsd_decay_samples": (
        "--lr-decay-style WSD --lr-wsd-decay-samples 40",
        "--lr-wsd-decay-samples 44",
    ),
    "weight_decay": "--weight-decay 0.1",
    "start_weight_decay": (GROWING, "--start-weight-decay 0.05"),
    "end_weight_decay": (GROWING, "--end-weight-decay 0.3"),
    "weight_decay_incr_style": (GROWING, "--weight-decay-incr-style cosine"),
    "clip_grad": "--clip-grad 0.5",
    "adam_beta1": "--adam-beta1 0.1",
    "adam_beta2": "--adam-beta2 0.5",
    "adam_eps": "--adam-eps 1e-3",
    "sgd_momentum": ("--optimizer sgd", "--sgd-momentum 0.5"),
    "attention_dropout": "--attention-dropout 0.1",
    "hidden_dropout": "--hidden-dropout 0.1",
    "global_batch_size": ("--train-samples 160 --lr-warmup-iters 0", "--global-batch-size 16"),
    "rampup_batch_size": ("--train-samples 160", "--rampup-batch-size 4 4 16"),
    "train_iters": ("--lr-decay-iters 20", "--train-iters 30"),
    "train_samples": ("--lr-decay-iters 20 --train-samples 160", "--train-samples 200"),
    "bf16": "--bf16",
    "accumulate_allreduce_grads_in_fp32": ("--bf16", "--grad-reduce-in-bf16"),
    "check_for_nan_in_loss_and_grad": "--no-check-for-nan-in-loss-and-grad",
    "iterations_to_skip": "--iterations-to-skip 12 13",
    "train_new_rows_samples": ("--train-new-rows-samples 16", "--train-new-rows-samples 0"),
    "ema_decay": "--ema-decay 0.9",
    "fp8_format": ("--bf16", "--fp8-format hybrid"),
    "fp8_recipe": (FP8, "--fp8-recipe tensorwise"),
    "fp8_margin": (FP8, "--fp8-margin 1"),
    "fp8_amax_history_len": (f"{FP8} --fp8-amax-compute-algo max", "--fp8-amax-history-len 4"),
    "fp8_amax_compute_algo": (FP8, "--fp8-amax-compute-algo max"),
    "fp8_param_gather": (f"{FP8} --use-distributed-optimizer", "--fp8-param-gather"),
    "tp_only_amax_red": (FP8, "--tp-only-amax-red"),
    "first_last_layers_bf16": (TENSORWISE, "--first-last-layers-bf16"),
    "num_layers_at_start_in_bf16": (EDGES, "--num-layers-at-start-in-bf16 2"),
    "num_layers_at_end_in_bf16": (EDGES, "--num-layers-at-end-in-bf16 2"),
    "reset_position_ids": "--reset-position-ids",
    "reset_attention_mask": "--reset-attention-mask",
    "eod_mask_loss": "--eod-mask-loss",
    "make_vocab_size_divisible_by": "--make-vocab-size-divisible-by 64",
    "micro_batch_size": "--micro-batch-size 2",
    "use_distributed_optimizer": "--use-distributed-optimizer",
    "recompute_granularity": "--recompute-granularity selective",
    "transformer_impl": "--transformer-impl local",
    "max_nonfinite_iterations": "--max-nonfinite-iterations 9",
    "exit_interval": "--exit-interval 11",
    "save_interval": "--save-interval 3",
    "eval_interval": "--eval-interval 3",
    "log_interval": "--log-interval 7",
    "init_method_std": "--init-method-std 0.01",
    "use_cpu_initialization": "--use-cpu-initialization",
}
"""{setting: flags that change it}, with flags of the saved run before them where it needs any."""

TESTED_ELSEWHERE = {"curriculum", "data_path", "vocab_file", "merge_file"}
"""In test_changes.py; files of GPT2BPETokenizer are compared as tokenizer_model is."""


def test_every_setting_has_a_class_and_every_class_that_matters_a_change() -> None:
    settings = set(section_of())
    assert set(AT_RESUME) == settings, (
        "config/resume_policy.py must say what a change at resume does"
    )
    free = (AtResume.LAYOUT, AtResume.CONTROL, AtResume.START)
    tested = {name for name in settings if AT_RESUME[name] not in free} - TESTED_ELSEWHERE
    assert tested <= set(CHANGES) <= settings
    assert {AT_RESUME[name] for name in CHANGES} >= set(free)


def test_the_table_of_the_docs_is_that_of_the_code() -> None:
    assert f"\n{resume_table()}\n" in DOCS.read_text(encoding="utf-8")


def settings(sample: Path, words: str) -> Config:
    base = {name: value for section in SETTINGS.values() for name, value in section.items()}
    base["curriculum"] = str(sample / "curriculum.yaml")
    if "--train-samples" in words or "--rampup" in words:
        del base["train_iters"]
    return resolve(parse(make_parser("test", ""), words.split(), base)[0], 1)


@pytest.fixture(scope="module")
def inputs(sample: Path) -> Inputs:
    return open_inputs(settings(sample, ""))


@dataclasses.dataclass
class Saved:
    """A checkpoint of sample 80 that was made with some settings, without its tensors."""

    sample: Path
    run: Path
    before: str
    inputs: Inputs

    def load(self, words: str) -> ResumePoint:
        """What `train` does with it before process groups and models exist."""
        config = settings(self.sample, f"{self.before} {words} --load {self.run}")
        of_data = {"--seed", "--seq-length", "--split", "--tokenizer-type", "--tokenizer-model"}
        inputs = self.inputs
        if of_data & set(words.split()):
            inputs = open_inputs(config)
        elif config.tokenizer.vocab_size:
            inputs = dataclasses.replace(inputs, vocab_size=config.tokenizer.vocab_size)
        return resolve_resume_point(config, inputs)

    def refused(self, words: str) -> str:
        with pytest.raises(ChatflowError) as error:
            self.load(words)
        return str(error.value)


@pytest.fixture
def save(sample: Path, reference: Path, inputs: Inputs, tmp_path: Path) -> Any:
    def make(before: str = "") -> Saved:
        config = settings(sample, before)
        folder = tmp_path / "run" / "iter_0000010"
        shutil.copytree(
            reference / "iter_0000010", folder, ignore=shutil.ignore_patterns("manifest.json")
        )
        (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("10\n")
        state = json.loads((reference / "iter_0000010" / "state.json").read_text())
        state["settings"] = settings_to_save(config, inputs.vocab_size, Schedule.of(config))
        state.pop("sealed", None)
        (folder / "state.json").write_text(json.dumps(state))
        return Saved(sample, tmp_path / "run", before, inputs)

    return make


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_does_what_its_class_says(
    save: Any, sample: Path, tmp_path: Path, name: str
) -> None:
    change = CHANGES[name]
    before, words = change if isinstance(change, tuple) else ("", change)
    if "OTHER" in words:
        other = tmp_path / "tokenizer.model"
        made_other_tokenizer(other)
        words = words.replace("OTHER", str(other))
    saved = save(before)
    if name != "train_new_rows_samples":  # which needs an extended tokenizer
        assert saved.load("").notes == ()
    kind, named = AT_RESUME[name], COMPARED_AS.get(name, name)
    if kind == AtResume.MODEL:
        assert f"{named} is " in saved.refused(words)
        assert f"{named} is " in saved.refused(f"{words} --finetune")
    elif kind == AtResume.POSITIONS:
        assert f"{named} is " in saved.refused(words)
        assert f"{named} " in "".join(saved.load(f"{words} --finetune").notes)
    elif kind == AtResume.DATA:
        assert named in saved.refused(words) or "tokenizer" in saved.refused(words)
    elif kind == AtResume.KIND:
        assert f"{named} is sgd here and adam in the checkpoint; give" in saved.refused(words)
        assert "optimizer sgd (before: adam)" in "".join(
            saved.load(f"{words} --no-load-optim").notes
        )
    elif kind == AtResume.SCHEDULE:
        assert f"{named} is " in saved.refused(words)
        check_schedule(
            saved, settings(sample, before), settings(sample, f"{before} {words}"), words, named
        )
    else:
        reported = f"{named} " in "".join(saved.load(words).notes)
        assert reported == (kind == AtResume.REPORTED)
        section = section_of()[name]
        wanted = getattr(getattr(settings(sample, f"{before} {words}"), section), name)
        start = saved.load(words).config
        found = (
            start.training.train_samples
            if name == "train_iters" and start.training.train_iters is None
            else getattr(getattr(start, section), name)
        )
        assert found == (240 if name == "train_iters" and found == 240 else wanted)


def check_schedule(saved: Saved, old: Config, new: Config, words: str, named: str) -> None:
    """Under either flag all of the schedule is that of `new` or of `old`."""

    def schedule(config: Config, lengths: Schedule) -> dict[str, Any]:
        values = training_settings(config, lengths)
        return {key: value for key, value in values.items() if kind_of(key) == AtResume.SCHEDULE}

    start = saved.load(f"{words} {OVERRIDE}")
    assert schedule(start.config, start.schedule) == schedule(new, Schedule.of(new))
    assert f"this command's ({OVERRIDE}): " in start.notes[0] and f"{named} " in start.notes[0]
    start = saved.load(f"{words} {USE_CHECKPOINT}")
    assert schedule(start.config, start.schedule) == schedule(old, Schedule.of(old))
    assert schedule(start.config, Schedule.of(start.config)) == schedule(old, Schedule.of(old))
    assert (
        f"the checkpoint's ({USE_CHECKPOINT}): " in start.notes[0] and f"{named} " in start.notes[0]
    )


def made_other_tokenizer(path: Path) -> None:
    import sentencepiece

    texts = iter([f"other words {i} of another text" for i in range(300)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_prefix=str(path.with_suffix("")),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )


def test_all_differences_are_in_one_message(save: Any) -> None:
    message = save().refused(
        "--num-layers 2 --ffn-hidden-size 128 --rotary-base 5000 --lr 1e-3 --adam-beta2 0.5 "
        "--optimizer sgd"
    )
    for part in (
        "num_layers is 2 here and 4 in the checkpoint, "
        "ffn_hidden_size is 128 here and 96 in the checkpoint; give the checkpoint's",
        ". Also, rotary_base is 5000 here and 10000 in the checkpoint; ",
        ". Also, optimizer is sgd here and adam in the checkpoint; ",
        ". Also, lr is 0.001 here and 0.003 in the checkpoint, "
        "adam_beta2 is 0.5 here and 0.999 in the checkpoint; add ",
    ):
        assert part in message, message
    assert "\n" not in message


def test_lengthening_a_run_at_a_constant_rate_needs_no_flag(save: Any) -> None:
    saved = save("--lr-decay-style constant")
    assert saved.load("--train-iters 30").notes == (
        "changed from iteration 11 on: train_samples 240 (before: 160)",
    )


def test_lengthening_a_run_at_a_decaying_rate_is_refused(save: Any) -> None:
    message = save().refused("--train-iters 30")
    assert "lr_decay_samples is 240 here and 160 in the checkpoint; add" in message
    assert OVERRIDE in message and USE_CHECKPOINT in message


def test_the_length_of_a_growing_weight_decay_is_the_checkpoints_where_that_was_asked_for(
    save: Any,
) -> None:
    saved = save(f"{GROWING} --lr-decay-style constant")
    assert "weight_decay_incr_samples is 240 here and 160 in the checkpoint" in saved.refused(
        "--train-iters 30"
    )
    assert saved.load(f"--train-iters 30 {USE_CHECKPOINT}").schedule.total == 160
    assert saved.load(f"--train-iters 30 {OVERRIDE}").schedule.total == 240


def test_equal_models_in_other_words_are_equal(save: Any) -> None:
    saved = save("--num-query-groups 4")
    assert (
        saved.load(
            "--kv-channels 12 --max-position-embeddings 4096 --add-qkv-bias --no-add-qkv-bias"
        ).notes
        == ()
    )


def test_a_checkpoint_of_version_0_1_0_is_compared_by_its_config_yaml(
    save: Any, reference: Path
) -> None:
    """It has no settings in state.json: the schedule is there, the rest in config.yaml."""
    saved = save()
    path = saved.run / "iter_0000010" / "state.json"
    state = json.loads(path.read_text())
    del state["settings"]
    path.write_text(json.dumps(state))
    assert "lr is 0.004 here and 0.003 in the checkpoint; add" in saved.refused("--lr 4e-3")
    (note,) = saved.load("--hidden-dropout 0.1").notes
    assert note.startswith(f"not compared, {path.parent} does not record them: ")
    assert "num_layers, " in note and "hidden_dropout" in note and " lr," not in note
    (note,) = saved.load("--finetune --num-layers 3").notes
    assert note == f"{path.parent} does not record its settings, so the model is not compared"
    shutil.copy(reference / "config.yaml", saved.run)
    (note,) = saved.load("").notes
    assert note == f"not compared, {path.parent} does not record them: vocab_size"
    message = saved.refused("--num-layers 3 --lr 4e-3 --adam-beta1 0.5 --lr-warmup-init 1e-5")
    for name in ("num_layers is 3", "lr is 0.004", "adam_beta1 is 0.5", "lr_warmup_init is 1e-05"):
        assert name in message
    assert "num_layers is 3" in saved.refused("--num-layers 3 --finetune")


def test_what_an_old_optimizer_really_used_is_compared(sample: Path) -> None:
    """Version 0.1.0 wrote the settings of the command, and trained with the checkpoint's."""
    group = {"max_lr": 3e-3, "min_lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    assert check_optimizer_group(group, settings(sample, "")) is None
    with pytest.raises(ChatflowError, match="adam_beta2 is 0.5 here and was 0.999; add --override"):
        check_optimizer_group(group, settings(sample, "--adam-beta2 0.5"))
    note = check_optimizer_group(group, settings(sample, f"--adam-beta2 0.5 {OVERRIDE}"))
    assert note and "adam_beta2 0.5 (in the optimizer of the checkpoint: 0.999)" in note


def test_momentum_cannot_be_started_from_a_checkpoint_without(save: Any) -> None:
    saved = save("--optimizer sgd --sgd-momentum 0")
    assert "holds no momentum" in saved.refused(f"--sgd-momentum 0.9 {OVERRIDE}")
    assert (
        saved.load(f"--sgd-momentum 0.9 {OVERRIDE} --no-load-optim").config.optimizer.sgd_momentum
        == 0.9
    )
    assert saved.load(f"--sgd-momentum 0.9 {USE_CHECKPOINT}").config.optimizer.sgd_momentum == 0.0
