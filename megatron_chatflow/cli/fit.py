"""``chatflow fit``: scaling laws from tables of runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_chatflow.cli.run_command import note, run_command
from megatron_chatflow.config import CommandParser
from megatron_chatflow.config.arguments import non_negative_int, positive_float, positive_int
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.laws.registry import FORMS, FitSettings

if TYPE_CHECKING:
    from megatron_chatflow.planner.laws.run_table import RunRecord

EPILOG = """examples:
  {call} runs.csv
  {call} runs/0.3M runs/1M runs/5M     # run directories
  {call} runs.csv --flops 1e20 1e21 --output law.json --plot law.png
  {call} runs.csv --columns params=n_params tokens=n_tokens --where eval_set=c4_en
  # the loss of a run that does not exist yet; which of a list of runs to do next
  {call} runs.csv --predict 6887575552:3.945e12
  {call} runs.csv --candidates affordable.csv

exit codes: 0 fitted, 2 the runs do not determine the law, or the table or flags cannot be used
"""


def parser(prog: str = "chatflow fit") -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        prog,
        "Fit scaling laws to runs, from scratch and continued jointly, with intervals, the best "
        "size and length for a budget, and the runs to do next. N is the number of non-embedding "
        "and output parameters, D of training tokens, the loss that of the end of an annealed run.",
        EPILOG,
    )
    parser.usage = f"{parser.call} TABLE... [flags]"
    parser.add_argument(
        "tables",
        nargs="*",
        type=Path,
        metavar="TABLE",
        help="CSV file with a row per run, or a run directory",
    )
    _add_input_flags(parser)
    _add_fit_flags(parser)
    _add_question_flags(parser)
    _add_output_flags(parser)
    parser.check = _check
    return parser


def _add_input_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("input")
    group.add_argument(
        "--columns",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=COLUMN",
        help="columns of other names, such as params=n_params; fields are params, tokens, loss, "
        "bits_per_byte, kind, language, share, replay, seed, flops, annealed, tokenizer, name",
    )
    group.add_argument(
        "--where",
        nargs="+",
        action="extend",
        default=[],
        metavar="COLUMN=VALUE",
        help="read only the rows with these values, such as language=zh",
    )
    group.add_argument(
        "--leave-out",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="leave out the runs of these names",
    )
    group.add_argument(
        "--allow-unannealed",
        action="store_true",
        help="use runs whose learning rate had not finished decaying",
    )
    group.add_argument(
        "--bits-per-byte",
        action="store_true",
        help="fit bits per byte. Default: the loss per token; bits per byte where the runs have "
        "several tokenizers or no loss.",
    )


def _add_fit_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("fit")
    forms = "; ".join(f"{name}: {form.what}" for name, form in FORMS.items())
    group.add_argument(
        "--form", choices=tuple(FORMS), default="auto", help=f"{forms}. Default: auto."
    )
    group.add_argument(
        "--huber",
        type=positive_float,
        metavar="DELTA",
        help="minimize Huber's function, with this delta, of the residuals of log loss; papers use "
        "1e-3. Default: least squares.",
    )
    group.add_argument(
        "--bootstrap",
        type=non_negative_int,
        default=FitSettings.draws,
        metavar="N",
        help=f"refits for the intervals of plans. Default: {FitSettings.draws}.",
    )
    group.add_argument(
        "--resample",
        choices=("residuals", "runs"),
        default=FitSettings.resample,
        help="what the bootstrap draws; runs where the noise differs between runs. Default: "
        "residuals.",
    )
    group.add_argument(
        "--seed",
        type=non_negative_int,
        default=FitSettings.seed,
        metavar="N",
        help="seed of the bootstrap. Default: 0.",
    )


def _add_question_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("questions")
    group.add_argument(
        "--flops",
        "--budget",
        nargs="+",
        type=positive_float,
        default=[],
        metavar="FLOPS",
        help="budgets to allocate, in floating-point operations (C = 6 N D). Default: the largest "
        "run's, and ten times that.",
    )
    group.add_argument(
        "--params",
        nargs="+",
        type=_count,
        default=[],
        metavar="N",
        help="sizes that are given: what the budgets give with them, and how much is given away",
    )
    group.add_argument(
        "--predict",
        nargs="+",
        type=_size_and_length,
        default=[],
        metavar="N:D",
        help="predict the loss of runs of N parameters and D tokens, e.g. 7e9:2e12",
    )
    group.add_argument(
        "--candidates",
        type=Path,
        metavar="FILE",
        help="CSV of runs (params, tokens, kind) that could be added, to choose from. Default: a "
        "grid around the runs, none more expensive than the most expensive.",
    )
    group.add_argument(
        "--next",
        type=positive_int,
        default=FitSettings.proposals,
        metavar="N",
        help=f"how many runs to propose. Default: {FitSettings.proposals}.",
    )
    group.add_argument(
        "--as-printed",
        action="store_true",
        help="show the constants that papers print, with nothing planned from them, and exit",
    )


def _add_output_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object, not tables")
    group.add_argument("--output", type=Path, metavar="FILE", help="write the JSON to a file")
    group.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help="draw residuals, losses over N and D, and the compute frontier; with several "
        "languages one file each, NAME-LANGUAGE.png",
    )


def _check(args: argparse.Namespace) -> list[str]:
    found = []
    if args.as_printed and (args.tables or args.flops or args.params or args.predict):
        found.append(
            "--as-printed shows printed constants and plans nothing; give it alone, or fit a TABLE"
        )
    if not args.as_printed and not args.tables:
        found.append("give a TABLE: a CSV file with a row per run, or run directories")
    for flag in ("columns", "where"):
        for word in getattr(args, flag):
            key, equals, value = word.partition("=")
            if not (key and equals and value):
                found.append(f"--{flag}: {word!r} has no =; write {flag_example(flag)}")
    return found


def flag_example(flag: str) -> str:
    """Return how the words of a flag look."""
    return "--columns params=n_params" if flag == "columns" else "--where language=zh"


def main(argv: Sequence[str] | None = None, prog: str = "chatflow fit") -> int:
    """Fit; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_command(prog, lambda: _fit(parser(prog).parse(words)))


def _fit(args: argparse.Namespace) -> int:
    if args.as_printed:
        from megatron_chatflow.planner.laws import printed

        print("\n".join(printed.lines()))
        return 0
    from megatron_chatflow.planner.laws.fit_input import read_runs

    found = read_runs(
        args.tables,
        columns=_pairs(args.columns),
        where=_pairs(args.where),
        leave_out=args.leave_out,
        allow_unannealed=args.allow_unannealed,
        bits_per_byte=args.bits_per_byte,
    )
    settings = FitSettings(
        metric=found.metric,
        huber=args.huber,
        draws=args.bootstrap,
        resample=args.resample,
        seed=args.seed,
        budgets=tuple(args.flops),
        sizes=tuple(args.params),
        predictions=tuple(args.predict),
        candidates=_candidates(args.candidates),
        proposals=args.next,
    )
    analyze = FORMS[args.form].load()
    laws = []
    for language, runs in found.languages().items():
        if len(found.languages()) > 1:
            note(f"fitting {language or 'runs without a language'}: {len(runs)} runs")
        try:
            laws.append({"language": language} | analyze(args.form, runs, settings))
        except ConfigError as error:
            name = f"{', '.join(map(str, args.tables))}"
            raise ConfigError(f"{name}: {language + ': ' if language else ''}{error}") from None
    result = {"tables": list(map(str, args.tables)), "notes": found.notes, "laws": laws}
    _write(args, result)
    return 0


def _write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    from megatron_chatflow.report.law_table import law_table
    from megatron_chatflow.utils.files import disk_errors, write_atomically

    if args.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        for line in result["notes"]:
            print(line)
        for law in result["laws"]:
            print("\n".join(["", *law_table(law)]))
    written = []
    if args.output is not None:
        with disk_errors(args.output):
            write_atomically(args.output, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
        written.append(f"{args.output}: {len(result['laws'])} laws as JSON")
    if args.plot is not None:
        written += [_plot(_plot_path(args.plot, law, result), law) for law in result["laws"]]
    for line in written:
        note(line) if args.json else print(line)


def _plot_path(path: Path, law: dict[str, Any], result: dict[str, Any]) -> Path:
    if len(result["laws"]) == 1:
        return path
    return path.with_name(f"{path.stem}-{law['language'] or 'none'}{path.suffix}")


def _plot(path: Path, law: dict[str, Any]) -> str:
    from megatron_chatflow.planner.laws.plans import curves
    from megatron_chatflow.report.law_plots import plot_law

    if "points" not in law:
        return f"no plot of {law['form']} laws"
    drawn = curves(law)
    plot_law(path, law["points"], drawn)
    return f"{path}: plot of {len(law['points'])} runs"


def _candidates(path: Path | None) -> tuple[RunRecord, ...]:
    if path is None:
        return ()
    from megatron_chatflow.planner.laws.run_table import read_table

    return tuple(read_table(path, with_losses=False))


def _pairs(words: Sequence[str]) -> dict[str, str]:
    return dict((key, value) for key, _, value in (word.partition("=") for word in words))


def _count(text: str) -> int:
    value = float(positive_float(text))
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is below 1; give a number of parameters")
    return round(value)


def _size_and_length(text: str) -> tuple[int, int]:
    size, colon, length = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} has no colon; write N:D, e.g. 7e9:2e12")
    return _count(size), _count(length)
