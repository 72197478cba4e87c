"""The script of a SLURM job, as a function of what it runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_chatflow.errors import EXIT_PREEMPTED, ConfigError
from megatron_chatflow.utils.user_files import check_line

EXIT_AT_START = 138
"""Exit code of a process that SIGUSR1 ended while it started, before its handler was installed."""


@dataclass(frozen=True)
class Job:
    """A training run on a cluster."""

    words: Sequence[str]
    """What follows ``chatflow train``; paths are relative to `folder`."""
    save: str
    """The run directory, the same for all nodes."""
    folder: str
    """Where the job was submitted, and its working folder."""
    nodes: int
    ntasks_per_node: int
    """Processes per node, one per GPU."""
    gpus_per_node: int
    """0 requests none."""
    cpus_per_task: int
    lead_seconds: int
    """How long before the time limit the processes get the signal to save and exit."""
    container: str | None = None
    """Image for srun's --container-image (the pyxis plugin); None takes `chatflow` from PATH."""
    mounts: str | None = None
    """What the container sees, e.g. /shared:/shared."""
    sbatch: Sequence[str] = ()
    """Further flags of sbatch."""


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (words of a command, words after ``--`` for sbatch)."""
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def render(job: Job) -> str:
    """Return the text of the script.

    The job resumes automatically: the processes save and exit at the signal, the script requeues
    the job, and the next start finds the checkpoint. docs/clusters.md lists what it does at each
    exit code.

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
    lines = [f"#SBATCH --{name}={sbatch_quote(str(value))}" for name, value in head.items()]
    lines += [
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        *(f"#SBATCH {words}" for words in flag_lines(job.sbatch)),
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
        at_start=EXIT_AT_START,
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
            f"save: {job.save!r} holds a backslash, and SLURM then does not fill in the job's "
            "number in the name of the log; give --save another folder"
        )


def sbatch_quote(word: str) -> str:
    """Quote a word of an #SBATCH line: in it a backslash escapes in quotes of either kind.

    Older releases of sbatch blank `packjob` and `hetjob` anywhere in such a line; a backslash
    inside hides them.
    """
    word = re.sub(r'(["\\])', r"\\\1", word)
    word = re.sub("(?i)(pack|het)(?=job)", r"\1\\", word)
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII) else f'"{word}"'


def flag_lines(words: Sequence[str]) -> list[str]:
    """Return one line per flag; a word without a leading dash is the value of the previous one."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("-") or not lines:
            lines.append([])
        lines[-1].append(sbatch_quote(word))
    return [" ".join(line) for line in lines]


_SCRIPT = """#!/usr/bin/env bash
# Written by `chatflow submit`; docs/clusters.md explains it.
{head}
set -euo pipefail

save={save}

# The processes connect on the first node. Each takes its rank from what srun sets. A node list that
# cannot be read ends the job here.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${{hosts%%$'\\n'*}}" MASTER_PORT="$((10000 + SLURM_JOB_ID % 20000))"

# megatron-core requires it with tensor parallelism before Blackwell: kernels are launched in the
# order in which they were issued.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Leaves multiprocessors to the collectives while norms run, for communication that overlaps with
# computation.
export NVTE_FWD_LAYERNORM_SM_MARGIN=16 NVTE_BWD_LAYERNORM_SM_MARGIN=16
# Memory: segments that grow instead of fragmenting, and no blocks kept by collectives in flight.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TORCH_NCCL_AVOID_RECORD_STREAMS=1
# CPU threads per task; compiled kernels on a local disk, not in a shared home folder.
export OMP_NUM_THREADS="${{SLURM_CPUS_PER_TASK:-1}}"
export TRITON_CACHE_DIR="/tmp/triton_${{USER:-job}}_$SLURM_JOB_ID"
# Not set on purpose: NVTE_FLASH_ATTN, NVTE_FUSED_ATTN, NVTE_UNFUSED_ATTN, which the model sets.

# A run that has a checkpoint in its run directory resumes from it, whatever it started from.
pointer="$save/latest_checkpointed_iteration.txt"
resume=()
before=none
if [ -s "$pointer" ]; then
    before=$(cat "$pointer")
    resume=(--load "$save" --no-finetune)
fi

# --wait: when a process has exited, the others have a minute to exit too. --kill-on-bad-exit would
# kill those that still save.
code=0
{srun} \\
    chatflow train {train} "${{resume[@]}}" || code=$?

after=none
if [ -s "$pointer" ]; then after=$(cat "$pointer"); fi
if [ "$code" -eq 0 ]; then
    echo "job $SLURM_JOB_ID: the run is finished"
elif [ "$code" -eq 2 ]; then
    echo "job $SLURM_JOB_ID: the settings cannot be used (see the message above); not requeued" >&2
elif [ "$code" -eq {preempted} ] || [ "$code" -eq {at_start} ]; then
    echo "job $SLURM_JOB_ID: exited at a signal (code $code), with checkpoint $after; requeued"
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$after" != "$before" ]; then
    echo "job $SLURM_JOB_ID: failed with code $code after checkpoint $after; requeued to resume" >&2
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "job $SLURM_JOB_ID: failed with code $code before a new checkpoint; not requeued" >&2
fi
exit "$code"
"""
