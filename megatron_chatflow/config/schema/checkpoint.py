"""The section ``checkpoint``: where the run is saved and what it starts from."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_chatflow.config.schema.section import Section, flag_name, path_field


@dataclass(frozen=True)
class CheckpointSettings(Section):
    """Where the run is saved and what it starts from."""

    _intervals = ("save_interval", "save_retain_interval", "most_recent_k")

    save: str | None = path_field()
    """The run directory: checkpoints, config.yaml, plan.json, metrics.jsonl, tensorboard/."""
    load: str | None = path_field()
    """Run directory to resume from (usually the same as --save; an empty one starts from scratch).
    """
    save_interval: int | None = None
    """Iterations between checkpoints; one is always written at the end."""
    save_retain_interval: int | None = None
    """Keep the checkpoints of iterations that are multiples of this, and remove older ones except
    for the --most-recent-k newest.
    """
    most_recent_k: int | None = None
    """Keep this many newest checkpoints and remove older ones; all are kept by default, and 2 with
    --save-retain-interval.
    """
    async_save: bool = False
    """Write checkpoints while training continues."""
    exit_on_failed_save: bool = False
    """Stop when a checkpoint cannot be written (a full disk), instead of continuing and trying
    again at the next.
    """
    ckpt_step: int | None = None
    """Load this iteration instead of the latest."""
    branch_from: int | None = None
    """Start a branch: continue from this iteration of --load into --save, a new folder, also with
    another end of the schedule. The same command resumes the branch; --load is never written to.
    """
    finetune: bool = False
    """Load weights only: iteration, curriculum and optimizer start from scratch."""
    no_load_optim: bool = False
    """Do not load the optimizer state."""
    no_save_optim: bool = False
    """Do not save the optimizer state."""
    exit_on_missing_checkpoint: bool = False
    """Fail when --load has no checkpoint, instead of starting from scratch."""

    def validate(self) -> list[str]:
        """Return what is wrong with this section alone, one message per error."""
        errors = super().validate()
        if self.branch_from is None:
            return errors
        what = {"load": "the run to branch from", "save": "a new folder for the branch"}
        errors += [
            f"branch_from is {self.branch_from} and {name} is missing; give --{name} {text}"
            for name, text in what.items()
            if not getattr(self, name)
        ]
        errors += [
            f"{name} contradicts branch_from {self.branch_from}: a branch continues that "
            f"iteration, with its optimizer state; drop {flag_name(name)} or --branch-from"
            for name in ("finetune", "ckpt_step", "no_load_optim")
            if getattr(self, name) not in (None, False)
        ]
        return errors
