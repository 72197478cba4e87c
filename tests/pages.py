"""The commands of README.md and docs/*.md: read from the pages, and run on small files.

A command is a line of an indented block that begins with a program of `PROGRAMS`, with the lines
that a backslash or an open quote continues. Before it runs, the words of `SMALLER` are replaced,
and `/shared` becomes a folder of the test. `NOT_RUN` has the commands that cannot run, with the
reason; their flags are checked like those of all others.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
PROGRAMS = ("bash", "chatflow", "docker", "pip", "printf", "python", "srun", "torchrun")
SMALLER = {
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--new-tokens 8000": "--new-tokens 300",
    "--workers 8": "--workers 1",
    "--new-tokens 1000": "--new-tokens 100",
    "curriculum.yaml --world-size 512": "curriculum.yaml --world-size 8",
    "--world-size 128": "--world-size 8",
    "--world-size 64 ": "--world-size 8 ",
    "--train-iters 1000 --save-interval 200": "--train-iters 10 --save-interval 2",
    "--lr-wsd-decay-iters 100 --train-iters 500": "--lr-wsd-decay-iters 1 --train-iters 5",
    "--branch-from 400": "--branch-from 4",
    "--iteration 57": "--iteration 3",
    "iter_0001000": "iter_0000002",
    "--nodes 16": "--nodes 1",
    "/shared/": "shared/",
}
NOT_RUN = {
    r"pip install -e \.": "the tests run in an environment that has it",
    r"bash tests/run\.sh": "it runs the tests",
    r"python tests/.*": "it is a test",
    r"bash examples/quickstart/run\.sh": "tests/test_quickstart.py runs it",
    r"docker build .*": "needs docker",
    r"srun .*": "needs SLURM",
    r"python examples/gpu_smoke/smoke\.py": "needs a GPU",
    r".*olmo_ladder\.csv.*": "the table is not in the repository",
    r".* \.\.\.( .*)?": "flags are left out on the page",
}


def command_lines(page: str) -> list[str]:
    """Return the commands of a page in order, without comments, each on one line."""
    lines = iter((ROOT / page).read_text(encoding="utf-8").splitlines())
    found = []
    for line in lines:
        if not line.startswith("    ") or line.split()[:1] == [] or line.split()[0] not in PROGRAMS:
            continue
        text = line
        while text.endswith("\\"):
            text = text[:-1].rstrip() + " " + next(lines).strip()
        found.append(re.sub(r"\s+# .*$", "", text).strip())
    return found


def why_not_run(command: str) -> str | None:
    """Return the reason for not running a command; None if it runs."""
    return next((reason for rule, reason in NOT_RUN.items() if re.fullmatch(rule, command)), None)


def smaller(command: str) -> str:
    """Return the command on small files."""
    for words, fewer in SMALLER.items():
        command = command.replace(words, fewer)
    return command


def program_and_flags(command: str) -> tuple[list[str], list[str]] | None:
    """Return the words of a command of this project and its flags; None for other programs."""
    words = shlex.split(command)
    if "--" in words:
        words = words[: words.index("--")]
    if "train" in words and "-m" in words:
        words = ["chatflow", *words[words.index("megatron_chatflow") + 1 :]]
    if "chatflow" in words:
        at = words.index("chatflow")
        length = 3 if words[at + 1 :][:1] in (["corpus"], ["tokenizer"]) else 2
        start, rest = words[at : at + length], words[at + length :]
    elif words[0] == "python" and words[1].startswith("tools/"):
        start, rest = words[:2], words[2:]
    else:
        return None
    return start, [word.split("=")[0] for word in rest if re.match(r"--\w", word)]
