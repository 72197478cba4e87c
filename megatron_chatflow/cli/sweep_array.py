"""A sweep as one SLURM array job: a task trains one trunk with its branches, in order."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from megatron_chatflow.cli.slurm_script import EXIT_AT_START, flag_lines, sbatch_quote
from megatron_chatflow.cli.sweep_state import SETTINGS, is_finished
from megatron_chatflow.errors import EXIT_PREEMPTED, ConfigError
from megatron_chatflow.planner.sweep_file import Sweep
from megatron_chatflow.planner.sweep_plan import PlannedRun
from megatron_chatflow.report import console
from megatron_chatflow.utils.files import write_atomically
from megatron_chatflow.utils.user_files import absolute_path, check_line

SCRIPT = "sweep.sbatch"


def submit(
    sweep: Sweep,
    groups: Sequence[Sequence[PlannedRun]],
    args: argparse.Namespace,
    sbatch: Sequence[str],
) -> int:
    """Write the script into the folder of the sweep and give it to sbatch.

    Raises:
        ConfigError: there is no sbatch, or the processes do not divide into nodes.
    """
    left = [
        group
        for group in groups
        if not all(is_finished(run, sweep.runs / run.name) for run in group)
    ]
    if not left:
        console.say("all runs have finished; chatflow sweep --table writes the table")
        return 0
    script = render(sweep, left, args, sbatch)
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--slurm: sbatch is not on PATH; submit on a machine of the cluster, or leave out "
            "--slurm to run here"
        )
    path = sweep.runs / SCRIPT
    write_atomically(path, script)
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        console.complain(f"chatflow sweep: sbatch did not take {path}: {done.stderr.strip()}")
        return 1
    number = done.stdout.strip().split(";")[0]
    runs = sum(len(group) for group in left)
    console.say(
        f"array job {number} is queued: {len(left)} tasks, {runs} directories\n"
        f"script: {path}\nlogs:   {sweep.runs}/slurm-{number}_<task>.log\n"
        f"table:  {sweep.runs}/runs.csv, written after each task"
    )
    return 0


def render(
    sweep: Sweep,
    groups: Sequence[Sequence[PlannedRun]],
    args: argparse.Namespace,
    sbatch: Sequence[str],
) -> str:
    """Return the text of the script; the settings of the runs are in their directories.

    Raises:
        ConfigError: the processes do not divide into nodes, or a value holds a control character.
    """
    tasks = args.ntasks_per_node or sweep.processes // args.nodes
    if tasks * args.nodes != sweep.processes:
        raise ConfigError(
            f"processes is {sweep.processes}, not --nodes {args.nodes} x --ntasks-per-node "
            f"{tasks or '...'}; correct the file or the flags"
        )
    source = absolute_path(sweep.source)
    for key, text in {"runs": str(sweep.runs), "the sweep file": source}.items():
        check_line(key, text)
    for word in sbatch:
        check_line("what follows --", word)
    head = {
        "job-name": "chatflow-sweep",
        "chdir": os.getcwd(),
        "array": f"0-{len(groups) - 1}",
        "nodes": args.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": args.cpus_per_task,
        "signal": f"USR1@{args.lead_seconds}",
        "output": f"{str(sweep.runs).replace('%', '%%')}/slurm-%A_%a.log",
    }
    lines = [f"#SBATCH --{name}={sbatch_quote(str(value))}" for name, value in head.items()]
    lines += ["#SBATCH --open-mode=append", "#SBATCH --requeue"]
    lines += [f"#SBATCH {words}" for words in flag_lines(sbatch)]
    return _SCRIPT.format(
        head="\n".join(lines),
        cases="\n".join(_case(sweep, number, group) for number, group in enumerate(groups)),
        settings=SETTINGS,
        cpus=args.cpus_per_task,
        sweep=shlex.quote(source),
        preempted=EXIT_PREEMPTED,
        at_start=EXIT_AT_START,
    )


def _case(sweep: Sweep, number: int, group: Sequence[PlannedRun]) -> str:
    calls = "\n".join(
        f"    train {shlex.quote(str(sweep.runs / run.name))} {run.iterations}"
        + (" || exit 1" if run.is_leg else " || failed=1")
        for run in group
    )
    return f"{number})\n{calls}\n    ;;"


_SCRIPT = """#!/usr/bin/env bash
# Written by `chatflow sweep --slurm`; docs/scaling_laws.md explains it.
{head}
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${{hosts%%$'\\n'*}}" MASTER_PORT="$((10000 + SLURM_JOB_ID % 20000))"
# These are explained in the script of `chatflow submit`.
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NVTE_FWD_LAYERNORM_SM_MARGIN=16 NVTE_BWD_LAYERNORM_SM_MARGIN=16
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TORCH_NCCL_AVOID_RECORD_STREAMS=1
export OMP_NUM_THREADS="${{SLURM_CPUS_PER_TASK:-1}}"
export TRITON_CACHE_DIR="/tmp/triton_${{USER:-job}}_$SLURM_JOB_ID"

# Train the run of a directory until its iteration; one that has begun resumes. At a signal the run
# has saved and exited: the task is requeued.
train() {{
    local run=$1 last=$2 pointer=$1/latest_checkpointed_iteration.txt
    local resume=() before=none after code=0
    if [ -s "$pointer" ]; then
        before=$(cat "$pointer")
        resume=(--load "$run" --no-finetune)
    fi
    if [ "$before" = "$last" ]; then return 0; fi
    srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task={cpus} \\
        chatflow train --config "$run/{settings}" "${{resume[@]}}" || code=$?
    after=none
    if [ -s "$pointer" ]; then after=$(cat "$pointer"); fi
    echo "task $SLURM_ARRAY_TASK_ID: $run ended with code $code at iteration $after of $last"
    if [ "$code" -eq 0 ]; then return 0; fi
    if [ "$code" -eq {preempted} ] || [ "$code" -eq {at_start} ] || \\
            {{ [ "$code" -ne 2 ] && [ "$after" != "$before" ]; }}; then
        scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
        exit "$code"
    fi
    return "$code"
}}

failed=0
case "$SLURM_ARRAY_TASK_ID" in
{cases}
esac
srun --nodes=1 --ntasks=1 chatflow sweep {sweep} --table || failed=1
exit "$failed"
"""
