"""Which plan a resumed run follows, and whether its data is unchanged. Imports no torch."""

from __future__ import annotations

from typing import Any

from megatron_chatflow.config import Config
from megatron_chatflow.curriculum import BlendPlan, Curriculum
from megatron_chatflow.data import InstructDataset
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.training.data_setup import Inputs


def resume_plan(
    ledger: BlendPlan, wanted: BlendPlan, consumed: int, *, amend: bool, curriculum: Curriculum
) -> BlendPlan:
    """Return the plan to follow after `consumed` samples.

    Args:
        ledger: the plan of the checkpoint.
        wanted: the plan of the curriculum file and the run's settings as they are now.
        consumed: samples already trained on.
        amend: whether the file may have another past (--amend-curriculum).
        curriculum: what `wanted` was made from.

    Raises:
        ConfigError: the file has another past and `amend` is off; names the first sample that
            differs and both ways to resolve it.
    """
    candidate = ledger.follow(wanted)
    first = ledger.first_difference(candidate, consumed)
    if first is None:
        return candidate
    if amend:
        return ledger.amend_with(at=consumed, plan=wanted)
    raise ConfigError(
        f"the curriculum has another past than the checkpoint's ledger, first at sample "
        f"{first} of the {consumed} already trained on"
        f"{_moved_knots(ledger, wanted, curriculum)}; restore the file, or add "
        f"--amend-curriculum to keep the past unchanged and follow the file "
        "from here on"
    )


def check_seq_length(ledger: BlendPlan, seq_length: int) -> None:
    """Refuse another sequence length. Called first: it changes what corpora are compared by."""
    if ledger.seq_length != seq_length:
        raise ConfigError(
            f"seq_length is {seq_length} here and {ledger.seq_length} in the checkpoint, so its "
            f"samples are other tokens; use --seq-length {ledger.seq_length}, or --finetune to "
            "start a new run"
        )


def _moved_knots(ledger: BlendPlan, wanted: BlendPlan, curriculum: Curriculum) -> str:
    """Return why the stages of a file that may not have changed have moved.

    The reason is the length of the run, or the batch size.
    """
    if wanted.num_samples != ledger.num_samples and any(
        stage.relative for stage in curriculum.stages
    ):
        return (
            f" (percentages were of {ledger.num_samples} samples and are of "
            f"{wanted.num_samples} now)"
        )
    if wanted.global_batch_size != ledger.global_batch_size and curriculum.clock == "iterations":
        return (
            f" (iterations were of {ledger.global_batch_size} samples and are of "
            f"{wanted.global_batch_size} now)"
        )
    return ""


def data_identity(config: Config, inputs: Inputs) -> dict[str, Any]:
    """Return what determines the tokens behind every (domain, ordinal).

    It is saved with a checkpoint and compared at resume.
    """
    data, tokenizer = config.data, inputs.tokenizer
    return {
        "seed": config.training.seed,
        "split": data.split,
        "tokenizer": tokenizer and {"name": tokenizer.name, "hash": tokenizer.fingerprint()},
        "corpora": {name: domain.dataset.fingerprint() for name, domain in inputs.domains.items()},
        "documents": {name: list(domain.documents) for name, domain in inputs.domains.items()},
        "left_out": {
            name: domain.truncation.left_out
            for name, domain in inputs.domains.items()
            if isinstance(domain, InstructDataset)
        },
    }


def check_identity(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a resume that would read other tokens under the same ordinals.

    Domains may be added or removed.
    """
    for key, flag in (("seed", "--seed"), ("split", "--split")):
        if saved[key] != now[key]:
            raise ConfigError(
                f"{key} is {now[key]} here and {saved[key]} in the checkpoint, which would "
                f"read samples twice; use "
                f"{flag} {saved[key]}, or --finetune to start from scratch"
            )
    before, here = saved["tokenizer"], now["tokenizer"]
    if before and here and before["hash"] != here["hash"]:
        raise ConfigError(
            f"the tokenizer is {here['name']} here and another one, {before['name']}, in "
            f"the checkpoint, whose embeddings are for that one; give it "
            "with --tokenizer-type and --tokenizer-model"
        )
    for name, fingerprint in now["corpora"].items():
        if saved["corpora"].get(name, fingerprint) != fingerprint:
            raise ConfigError(
                f"domain {name}: its corpus is not the one the checkpoint was trained on; "
                f"restore the files, give the new "
                "corpus another domain name, or --finetune to start from scratch"
            )
        wanted = now["documents"][name]
        trained = saved["documents"].get(name, wanted)
        if trained != wanted:
            raise ConfigError(
                f"domain {name}: documents {wanted[0]} to {wanted[1]} would be trained on, "
                f"and were {trained[0]} to {trained[1]} so far, which would "
                f"read samples twice; restore domains.{name}.valid (other text "
                f"can be named under validation), or --finetune to start "
                "from scratch"
            )
        trained = saved.get("left_out", {}).get(name, 0)
        wanted = now["left_out"].get(name, 0)
        if trained != wanted and name in saved["corpora"]:
            remedy = (
                "restore train_on_prompt"
                if "left_out" in saved
                else "resume with the version that made the checkpoint"
            )
            raise ConfigError(
                f"domain {name}: {wanted} conversations without a token to train on are "
                f"left out, and {trained} were so far, which would read "
                f"samples twice; "
                f"{remedy}, "
                "give the corpus a new domain name, or --finetune to start over"
            )
