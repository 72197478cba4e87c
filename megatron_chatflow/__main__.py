"""The command line: ``python -m megatron_chatflow <command>``, installed also as ``chatflow``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from megatron_chatflow import __version__
from megatron_chatflow.errors import EXIT_USAGE, ConfigError

COMMANDS = {
    "train": ("train.main", "train a model, or resume training"),
    "plan": ("plan.main", "show the shares, samples, tokens and epochs of a curriculum"),
    "locate": ("locate.main", "show the documents of a sample or an iteration"),
    "evaluate": ("evaluate.main", "measure a checkpoint's loss and bits per byte per domain"),
    "generate": ("generate.main", "generate text with a checkpoint"),
    "propose": ("propose.main", "propose the shares of a run from a table of smaller runs"),
    "plot": ("plot.main", "plot the shares and losses of a run"),
    "fit": ("fit.main", "fit scaling laws to a table of runs"),
    "compare": ("compare.main", "compare the metrics and checkpoints of two runs bit for bit"),
    "preprocess": ("preprocess.main", "convert text to Megatron's .bin/.idx"),
    "corpus merge": ("corpus.merge_main", "merge the corpora of a folder"),
    "corpus verify": ("corpus.verify_main", "check corpora completely"),
    "tokenizer extend": ("tokenizer.extend_main", "extend a tokenizer for a new language"),
    "convert": ("convert.main", "convert weights from Hugging Face and back"),
    "doctor": ("doctor.main", "show what this machine can run, and why"),
    "preflight": ("preflight.main", "check a cluster configuration without the cluster"),
    "sweep": ("sweep.main", "train sizes x lengths x shares x seeds, for `fit`"),
    "submit": ("submit.main", "submit a run as a SLURM job"),
    "completion": ("completion.main", "print the completion script of a shell"),
}
"""{command: (function in `megatron_chatflow.cli`, what it does)}.

The parser of a command is the function ``parser`` next to ``main``, ``merge_parser`` next to
``merge_main``, and so on.
"""


def usage(group: str = "") -> str:
    """Return the text of ``chatflow --help``, or of a group such as ``chatflow corpus --help``."""
    rows = "\n".join(
        f"  {name:<17} {text}" for name, (_, text) in COMMANDS.items() if name.startswith(group)
    )
    return f"""usage: chatflow {group or "<command>"} {"<command> " * bool(group)}[flags]

{rows}

`chatflow <command> --help` shows the common flags of a command, `--help-all` all flags.
`python -m megatron_chatflow <command>` is the same. A first run: bash examples/quickstart/run.sh
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 the settings cannot be used."""
    words = list(sys.argv[1:] if argv is None else argv)
    group = words[0] if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS) else ""
    rest = words[1:] if group else words
    if not rest or rest[0] in ("-h", "--help"):
        print(usage(group), end="")
        return 0 if rest else EXIT_USAGE
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    from megatron_chatflow.cli.run_command import run_command
    from megatron_chatflow.config.arguments import nearest

    name = f"{group} {rest[0]}".strip()

    def work() -> int:
        if name not in COMMANDS:
            known = [other for other in COMMANDS if other.startswith(group)]
            others = nearest(name, known) or f"; the commands are {', '.join(known)}"
            raise ConfigError(f"unknown command {name!r}{others}")
        module, function = COMMANDS[name][0].split(".")
        command = importlib.import_module(f"megatron_chatflow.cli.{module}")
        return getattr(command, function)(rest[1:])

    return run_command(f"chatflow {name}", work)


if __name__ == "__main__":
    sys.exit(main())
