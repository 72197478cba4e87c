"""``chatflow propose``: the shares that a fitted law prefers, as a curriculum file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_chatflow.config import CommandParser, make_parser, parse, resolve_data, total_samples
from megatron_chatflow.config.arguments import positive_float
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.report import console

if TYPE_CHECKING:
    from megatron_chatflow.planner.laws.loss_models import LossModels
    from megatron_chatflow.planner.proposal import Problem, Stage

EPILOG = """examples:
  {call} table.csv --weights zh=0.7,en=0.3 --floors en=0.05
  # caps by the corpora of the run, and the file that train reads
  {call} table.csv --config run.yaml --curriculum curriculum.yaml --output proposed.yaml
  {call} table.csv --what-if en=0.3,zh=0.7 --tokens 8e9
  {call} --mixture regmix_mixture.csv --losses regmix_loss.csv --weights pile_cc=1

exit codes: 0 proposed, 2 the table cannot determine the law, or caps and floors contradict each
other
"""


def parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = make_parser(
        "chatflow propose",
        "Propose the shares of a run: those that minimize the predicted losses, by laws that are "
        "fitted to a table of runs, within caps and floors.",
        EPILOG,
        command="propose",
    )
    parser.usage = "chatflow propose [TABLE ...] [--config YAML] [flags]"
    add = parser.add_argument
    add(
        "tables",
        nargs="*",
        type=Path,
        metavar="TABLE",
        help="CSV files of runs with columns share:DOMAIN, run directories, or laws as JSON",
    )
    add("--mixture", type=Path, metavar="FILE", help="published table: shares of each run (CSV)")
    add("--losses", type=Path, metavar="FILE", help="published table: losses of each run (CSV)")
    add("--columns", nargs="+", default=[], metavar="FIELD=COLUMN", help="columns of other names")
    add("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="use only these rows")
    add("--allow-unannealed", action="store_true", help="use runs whose rate had not decayed")
    add("--form", choices=("mixture", "dcpt"), help="the law. Default: dcpt if it is determined.")
    add("--weights", metavar="NAME=W,...", help="weights of the losses. Default: all the same.")
    add("--floors", metavar="DOMAIN=X,...", help="smallest shares, e.g. of replay")
    add("--prior", metavar="DOMAIN=X,...", help="Default: the mean of the measured mixtures.")
    add(
        "--max-epochs",
        type=positive_float,
        default=4.0,
        metavar="X",
        help="cap of the domains that have none. Default: 4.",
    )
    add("--tokens", type=positive_float, metavar="N", help="training tokens of the run")
    add("--params", type=positive_float, metavar="N", help="parameters of its model (dcpt)")
    add("--available", metavar="DOMAIN=N,...", help="tokens of the domains, without --curriculum")
    add(
        "--stage",
        action="append",
        default=[],
        metavar="NAME:AT:NAME=W,...",
        help="propose shares per stage: its name, where it begins (0%%, 40%%) and its weights",
    )
    add("--what-if", metavar="DOMAIN=X,...", help="predict the losses of this mixture only")
    add("--save-laws", type=Path, metavar="FILE", help="write the fitted laws as JSON")
    add("--output", type=Path, metavar="FILE", help="the curriculum file to write")
    parser.check = _check
    return parser


def _check(args: argparse.Namespace) -> Iterator[str]:
    if (args.mixture is None) != (args.losses is None):
        yield "--mixture and --losses are a pair; give both"
    if bool(args.tables) == (args.mixture is not None):
        yield "give one source: TABLE ..., or --mixture FILE --losses FILE"
    if args.what_if and (args.output or args.stage):
        yield "--what-if only predicts; drop --output and --stage, or --what-if"


def main(argv: Sequence[str]) -> int:
    """Print predictions or a proposal; returns the exit code."""
    config, args = parse(
        parser(), argv, resolve=lambda c, _: resolve_data(c) if c.data.curriculum else c
    )
    if args.output and not config.data.curriculum:
        raise ConfigError("--output needs the domains; give --curriculum FILE and --config YAML")
    if config.data.curriculum and (args.tokens or args.available):
        raise ConfigError(
            "--tokens and --available are of the run and corpora of --curriculum; drop them"
        )
    from megatron_chatflow.cli.propose_laws import laws_of
    from megatron_chatflow.cli.propose_report import law_lines, prediction_lines

    available, tokens, inputs = _text_of_run(config, args)
    models = laws_of(args, _numbers("weights", args.weights)).at(
        args.params and round(args.params), tokens
    )
    if args.save_laws:
        from megatron_chatflow.planner.laws.loss_models import write_models

        write_models(args.save_laws, models)
        console.say(f"laws written to {args.save_laws}")
    for line in law_lines(models, tokens):
        console.say(line)
    if args.what_if:
        shares = _mixture(models, "what-if", args.what_if)
        for line in prediction_lines(models, shares, available, tokens):
            console.say(line)
        return 0
    return _propose(config, args, models, available, tokens, inputs)


def _text_of_run(config: Any, args: argparse.Namespace) -> tuple[dict[str, float], int | None, Any]:
    """Return (tokens of each domain, tokens of the run, opened inputs)."""
    if not config.data.curriculum:
        tokens = None if args.tokens is None else round(args.tokens)
        return _numbers("available", args.available), tokens, None
    from megatron_chatflow.training.data_setup import open_inputs

    inputs = open_inputs(config)
    length = config.data.seq_length
    available = {name: float(n * length) for name, n in inputs.epoch_samples.items()}
    return available, total_samples(config) * length, inputs


def _propose(
    config: Any,
    args: argparse.Namespace,
    models: LossModels,
    available: Mapping[str, float],
    tokens: int | None,
    inputs: Any,
) -> int:
    from megatron_chatflow.cli.propose_report import say_proposal, write_proposal
    from megatron_chatflow.planner.proposal import solve

    domains = inputs.curriculum.domains if inputs else {}
    epochs = {
        name: (domains[name].max_epochs if name in domains else None) or args.max_epochs
        for name in available
    }
    # A blend counts in samples, and the written weights are rounded.
    slack = 1e-5 + (len(domains) + len(args.stage) + 1) / total_samples(config) if inputs else 0.0
    problem = _problem(args, models, available, tokens, epochs, list(domains), slack)
    solution = solve(problem)
    say_proposal(models, problem, solution, available, tokens)
    if args.output:
        write_proposal(args, config, models, problem, solution, inputs, tokens)
    return 0


def _problem(
    args: argparse.Namespace,
    models: LossModels,
    available: Mapping[str, float],
    tokens: int | None,
    epochs: Mapping[str, float],
    named: Sequence[str],
    slack: float,
) -> Problem:
    import numpy as np

    from megatron_chatflow.planner.proposal import Problem

    prior = models.measured.mean(axis=0)
    if args.prior:
        prior = _mixture(models, "prior", args.prior)
    floors = _known(models, "floors", _numbers("floors", args.floors))
    caps, new_text, reasons = {}, {}, {}
    for name in models.domains:
        if named and name not in named:
            caps[name], reasons[name] = 0.0, "the curriculum file does not name it"
        elif tokens and name in available:
            most = epochs[name] * available[name] / tokens
            caps[name] = 1.0 if most >= 1 + slack else max(0.0, most - slack)
            new_text[name] = available[name] / tokens
            reasons[name] = (
                f"{epochs[name]:g} epochs of {available[name]:,.0f} tokens in a run of {tokens:,}"
            )
    return Problem(
        models.domains,
        models.models,
        _stages(args, models),
        prior,
        np.array([floors.get(name, 0.0) for name in models.domains]),
        np.array([caps.get(name, 1.0) for name in models.domains]),
        np.array([new_text.get(name, np.inf) for name in models.domains]),
        reasons,
    )


def _stages(args: argparse.Namespace, models: LossModels) -> tuple[Stage, ...]:
    from megatron_chatflow.planner.proposal import Stage

    equal = dict.fromkeys(models.models, 1.0)
    weights = _weights(models, "weights", _numbers("weights", args.weights) or equal)
    if not args.stage:
        return (Stage("proposed", 1.0, weights),)
    begins, found = [], []
    for text in args.stage:
        name, _, rest = text.partition(":")
        at, _, own = rest.partition(":")
        try:
            begins.append(float(at.removesuffix("%")) / 100)
        except ValueError:
            begins.append(-1.0)
        if not name or not own or not at.endswith("%"):
            raise ConfigError(f"--stage {text!r}: write NAME:AT:LANGUAGE=W,..., e.g. zh:40%:zh=1")
        found.append((name, _weights(models, f"stage {name}", _numbers("stage", own))))
    ends = [*begins[1:], 1.0]
    if begins[0] != 0 or any(a >= b for a, b in zip(begins, ends, strict=True)):
        raise ConfigError(
            "--stage: the first stage begins at 0%, and each one after that before it"
        )
    return tuple(
        Stage(name, end - begin, own)
        for (name, own), begin, end in zip(found, begins, ends, strict=True)
    )


def _weights(models: LossModels, key: str, given: Mapping[str, float]) -> dict[str, float]:
    for name in given:
        if name not in models.models:
            raise ConfigError(
                f"--{key}: no law of {name!r}; the languages are {', '.join(models.models)}"
            )
    total = sum(given.values())
    if not total > 0:
        raise ConfigError(f"--{key}: no weight is positive; give one to a language")
    return {name: weight / total for name, weight in given.items() if weight > 0}


def _mixture(models: LossModels, key: str, text: str) -> Any:
    """Return the shares [K] that weights of domains mean."""
    import numpy as np

    given = _known(models, key, _numbers(key, text))
    values = np.array([given.get(name, 0.0) for name in models.domains])
    if not values.sum() > 0:
        raise ConfigError(f"--{key}: no share is positive; give one to a domain")
    return values / values.sum()


def _known(models: LossModels, key: str, given: dict[str, float]) -> dict[str, float]:
    for name in given:
        if name not in models.domains:
            raise ConfigError(
                f"--{key}: {name!r} is not a domain of the runs; they are "
                f"{', '.join(models.domains)}"
            )
    return given


def _numbers(key: str, text: str | None) -> dict[str, float]:
    """Return {name: number} of ``NAME=X,NAME=Y``."""
    found: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, equals, value = part.strip().partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not name or not equals or not 0 <= number < float("inf"):
            raise ConfigError(f"--{key}: {part!r} is not NAME=NUMBER; write e.g. en=0.3,zh=0.7")
        if name in found:
            raise ConfigError(f"--{key}: {name} is given twice; drop one")
        found[name] = number
    return found
