"""The script of a SLURM job, as a function of what it runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_chatflow.errors import EXIT_PREEMPTED, ConfigError
from megatron_chatflow.utils.user_files import check_line

EXIT_UNHEARD = 138
"""Exit code of a process that SIGUSR1 ended while it started, before its handler was installed."""


@dataclass(frozen=True)
class Job:
    """A training run on a cluster."""

    words: Sequence[str]
    """What follows ``chatflow train``; paths are relative to `folder`."""
    save: str
    """The run directory, the same for all nodes."""
    folder: str
    """Where the job was submitted, and where it works."""
    nodes: int
    ntasks_per_node: int
    """Processes on a node, one a GPU."""
    gpus_per_node: int
    """0 leaves the request for GPUs out."""
    cpus_per_task: int
    lead_seconds: int
    """How long before the time limit the processes are told to save and leave."""
    container: str | None = None
    """Image for srun's --container-image (the pyxis plugin); None takes `chatflow` from PATH."""
    mounts: str | None = None
    """What the container sees, e.g. /shared:/shared."""
    sbatch: Sequence[str] = ()
    """Further flags of sbatch."""


def render(job: Job) -> str:
    """The text of the script.

    It resumes by itself: the processes leave with a checkpoint at the signal, the script puts the
    job back into the queue, and the next start finds the checkpoint. What it does at each exit code
    stands in docs/clusters.md.

    Raises:
        ConfigError: a value holds a control character, or the run directory a backslash.
    """
    _check(job)
    q = shlex.quote
    head = {
        "job-name": "chatflow",
        "chdir": job.folder,
        "nodes": job.nodes,
        "ntasks-per-node": job.ntasks_per_node,
        **({"gpus-per-node": job.gpus_per_node} if job.gpus_per_node else {}),
        "cpus-per-task": job.cpus_per_task,
        "signal": f"USR1@{job.lead_seconds}",
        "output": f"{job.save.replace('%', '%%')}/slurm-%j.log",
    }
    lines = [f"#SBATCH --{name}={_sbatch_quote(str(value))}" for name, value in head.items()]
    lines += [
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        *(f"#SBATCH {words}" for words in _flags(job.sbatch)),
    ]
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=60", f"--cpus-per-task={job.cpus_per_task}"]
    if job.container:
        srun += [f"--container-image={job.container}", f"--container-workdir={job.folder}"]
        srun += [f"--container-mounts={job.mounts}"] if job.mounts else []
    return _SCRIPT.format(
        head="\n".join(lines),
        save=q(job.save),
        srun=" ".join(map(q, srun)),
        train=" ".join(map(q, job.words)),
        preempted=EXIT_PREEMPTED,
        unheard=EXIT_UNHEARD,
    )


def _check(job: Job) -> None:
    values = {
        "save": [job.save],
        "the current folder": [job.folder],
        "container": [job.container or ""],
        "mounts": [job.mounts or ""],
        "the settings": job.words,
        "what follows --": job.sbatch,
    }
    for key, texts in values.items():
        for text in texts:
            check_line(key, text)
    if "\\" in job.save:
        raise ConfigError(
            f"save: {job.save!r} holds a backslash, and SLURM then does not fill in the "
            f"job's number "
            "in the name of the log; give --save another folder"
        )


def _sbatch_quote(word: str) -> str:
    """Quote a word of an #SBATCH line as sbatch reads it: there a backslash escapes in quotes of
    either kind.

    Older releases of sbatch blank `packjob` and `hetjob` anywhere in such a line; a backslash
    inside hides them.
    """
    word = re.sub(r'(["\\])', r"\\\1", word)
    word = re.sub("(?i)(pack|het)(?=job)", r"\1\\", word)
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII) else f'"{word}"'


def _flags(words: Sequence[str]) -> list[str]:
    """One line a flag: a word that does not begin with a dash is the value of the one before."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("-") or not lines:
            lines.append([])
        lines[-1].append(_sbatch_quote(word))
    return [" ".join(line) for line in lines]


_SCRIPT = """#!/usr/bin/env bash
# Made by `chatflow submit`, which says what every line is for: chatflow submit --help, docs/clusters.md.
{head}
set -euo pipefail

save={save}

# The processes meet on the first node. Each finds its rank in what srun sets for it. A node list that cannot be read ends the job here.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${{hosts%%$'\\n'*}}" MASTER_PORT="$((10000 + SLURM_JOB_ID % 20000))"

# Needed with tensor or context parallelism before Blackwell (megatron-core insists): kernels are launched in the order in which they were issued.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Leaves room on the device for the collectives while norms run; worth it when communication overlaps with computation.
export NVTE_FWD_LAYERNORM_SM_MARGIN=16 NVTE_BWD_LAYERNORM_SM_MARGIN=16
# Memory: segments that grow instead of fragmenting; and no blocks kept alive by collectives in flight.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TORCH_NCCL_AVOID_RECORD_STREAMS=1
# CPU threads of a task; a shared home folder is no place for compiled kernels.
export OMP_NUM_THREADS="${{SLURM_CPUS_PER_TASK:-1}}"
export TRITON_CACHE_DIR="/tmp/triton_${{USER:-job}}_$SLURM_JOB_ID"
# Left unset on purpose: NVTE_FLASH_ATTN, NVTE_FUSED_ATTN, NVTE_UNFUSED_ATTN (the model sets them and insists on its own values).

# With a checkpoint in the run directory the run goes on from it, whatever it was started from.
pointer="$save/latest_checkpointed_iteration.txt"
resume=()
before=none
if [ -s "$pointer" ]; then
    before=$(cat "$pointer")
    resume=(--load "$save" --no-finetune)
fi

# --wait: when a process has ended, the others have a minute to follow. --kill-on-bad-exit would end those that still leave in order.
code=0
{srun} \\
    chatflow train {train} "${{resume[@]}}" || code=$?

after=none
if [ -s "$pointer" ]; then after=$(cat "$pointer"); fi
if [ "$code" -eq 0 ]; then
    echo "job $SLURM_JOB_ID: the run is finished"
elif [ "$code" -eq 2 ]; then
    echo "job $SLURM_JOB_ID: the configuration is refused (see the message above); a new try would end the same way" >&2
elif [ "$code" -eq {preempted} ] || [ "$code" -eq {unheard} ]; then
    echo "job $SLURM_JOB_ID: left at a signal (code $code), with checkpoint $after; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$after" != "$before" ]; then
    echo "job $SLURM_JOB_ID: failed with code $code, after checkpoint $after; back into the queue, to go on from there" >&2
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "job $SLURM_JOB_ID: failed with code $code before a new checkpoint; a new try would likely end the same way" >&2
fi
exit "$code"
"""
