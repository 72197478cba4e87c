"""Read and check a curriculum file.

Every error is one message with file, key, value and what to do. Nothing is guessed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_chatflow.curriculum.checks import (
    Fail,
    check_choice,
    check_keys,
    check_number,
    check_one_line,
    kind_name,
    parse_position,
    suggestion,
)
from megatron_chatflow.curriculum.presets import parse_preset
from megatron_chatflow.curriculum.ramps import RAMPS, valid_ramp
from megatron_chatflow.curriculum.schema import (
    CLOCKS,
    KINDS,
    ON_EXHAUSTED,
    Curriculum,
    Domain,
    Stage,
)
from megatron_chatflow.errors import ChatflowError, ConfigError
from megatron_chatflow.utils.user_files import (
    load_yaml,
    read_text,
    valid_name,
    visible,
)

_SUFFIXES = ("_text_document", "_document")


def load_curriculum(path: str | Path) -> Curriculum:
    """Read a curriculum file; docs/curriculum.md describes it.

    Relative paths of domains are resolved against the file's folder. Only the text is checked:
    whether the corpora exist is checked when they are opened.

    Raises:
        ConfigError: the file is missing, not YAML, or says something wrong; one message with file,
            key, value and what to do.
    """
    try:
        text = read_text(path)
    except ChatflowError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); give the path of a curriculum file"
        ) from None
    try:
        mapping = load_yaml(text)
    except ChatflowError as error:
        raise ConfigError(f"{path}: {error}") from None
    return parse_curriculum(mapping, source=str(path), folder=Path(path).parent)


def parse_curriculum(mapping: Any, *, source: str, folder: str | Path) -> Curriculum:
    """Check a curriculum that is already loaded.

    Args:
        mapping: what the YAML file holds (clock, domains, stages or preset, on_exhausted,
            validation).
        source: what error messages call it, e.g. the file.
        folder: the folder that relative paths of domains are resolved against.

    Raises:
        ConfigError: something is wrong; one message with source, key, value and what to do.
    """

    def fail(key: str, problem: str, advice: str) -> NoReturn:
        raise ConfigError(visible(f"{source}: {key}: {problem}; {advice}"))

    if not isinstance(mapping, Mapping):
        fail(
            "curriculum",
            f"a mapping is expected, found {kind_name(mapping)}",
            "write clock, domains and stages",
        )
    keys = ("clock", "domains", "stages", "preset", "on_exhausted", "validation")
    check_keys(mapping, keys, "", fail)
    clock = check_choice(mapping.get("clock", "samples"), CLOCKS, "clock", fail)
    on_exhausted = check_choice(
        mapping.get("on_exhausted", "repeat"), ON_EXHAUSTED, "on_exhausted", fail
    )
    entries = mapping.get("domains")
    if not isinstance(entries, Mapping) or not entries:
        problem = (
            "no domain is named"
            if not entries
            else f"a mapping is expected, found {kind_name(entries)}"
        )
        fail("domains", problem, "write at least one as `name: {path: prefix}`")
    domains = {name: _domain(name, entry, Path(folder), fail) for name, entry in entries.items()}
    preset = parse_preset(mapping["preset"], domains, fail) if "preset" in mapping else None
    if preset and "stages" in mapping:
        fail(
            "preset",
            f"stages are given as well as preset {preset.name!r}, which has stages already",
            "drop one of the two",
        )
    return Curriculum(
        clock,
        domains,
        preset.stages if preset else _stages(mapping.get("stages"), domains, fail),
        on_exhausted,
        source,
        _validation(mapping.get("validation", {}), domains, Path(folder), fail),
        preset,
    )


def _stages(written: Any, domains: Mapping[str, Domain], fail: Fail) -> tuple[Stage, ...]:
    if not isinstance(written, Sequence) or isinstance(written, str) or not written:
        problem = (
            "no stage is given"
            if not written
            else f"a list is expected, found {kind_name(written)}"
        )
        fail("stages", problem, "write at least one as `- {name: start, at: 0, weights: {...}}`")
    stages: list[Stage] = []
    order = _Order()
    for number, entry in enumerate(written, 1):
        stage = _stage(entry, f"stages[{number}]", domains, fail)
        order.check(stage, f"stages[{number}]", fail)
        stages.append(stage)
    return tuple(stages)


def constant_curriculum(pairs: Iterable[tuple[float, str]]) -> Curriculum:
    """Return the curriculum that Megatron's --data-path means: fixed weights over the run.

    Args:
        pairs: (weight, prefix) of each corpus. A domain is called by the last part of its prefix,
            without `_text_document` or `_document`.

    Raises:
        ConfigError: two corpora would have one name, a weight is negative or not a number, or none
            is positive.
    """
    source, domains, weights = "--data-path", {}, {}
    for weight, prefix in pairs:
        name = os.path.basename(os.fspath(prefix))
        name = next(
            (name.removesuffix(s) for s in _SUFFIXES if name.endswith(s) and name != s), name
        )
        if name in domains:
            other = domains[name]["path"]
            raise ConfigError(
                f"{source}: {prefix} and {other} would both be called {name!r}; write a "
                f"curriculum file, where each domain has a name"
            )
        domains[name], weights[name] = {"path": os.fspath(prefix)}, weight
    if not domains:
        raise ConfigError(f"{source}: no corpus is given; write WEIGHT PREFIX pairs")
    stages = [{"name": "constant", "at": 0, "weights": weights}]
    return parse_curriculum({"domains": domains, "stages": stages}, source=source, folder=Path())


def _domain(name: Any, entry: Any, folder: Path, fail: Fail) -> Domain:
    key = _entry_key(
        "domains",
        "a domain",
        name,
        entry,
        ("path", "kind", "max_epochs", "valid", "train_on_prompt"),
        fail,
    )
    path = _prefix(entry.get("path"), f"{key}.path", folder, fail)
    cap = entry.get("max_epochs")
    if cap is not None:
        cap = check_number(cap, f"{key}.max_epochs", fail)
        if cap <= 0:
            fail(
                f"{key}.max_epochs",
                f"{cap} is not positive",
                "write how often the domain may be read at most, or leave it out",
            )
    valid = _prefix(entry["valid"], f"{key}.valid", folder, fail) if "valid" in entry else None
    kind = check_choice(entry.get("kind", "text"), KINDS, f"{key}.kind", fail)
    return Domain(
        name, path, kind, cap, valid, _train_on_prompt(entry, kind, f"{key}.train_on_prompt", fail)
    )


def _train_on_prompt(entry: Mapping[str, Any], kind: str, key: str, fail: Fail) -> bool:
    value = entry.get("train_on_prompt", False)
    if not isinstance(value, bool):
        fail(
            key,
            f"a truth value is expected, found {kind_name(value)} {value!r}",
            "write true or false",
        )
    if "train_on_prompt" in entry and kind != "instruct":
        fail(
            key,
            f"a domain of kind {kind} has no prompts, all of it is trained on",
            "drop the key, or write `kind: instruct`",
        )
    return value


def _validation(
    entries: Any, domains: Mapping[str, Domain], folder: Path, fail: Fail
) -> dict[str, Domain]:
    """Return the named validation sets; check that no held-out corpus is also trained on."""
    if not isinstance(entries, Mapping):
        fail(
            "validation",
            f"a mapping is expected, found {kind_name(entries)}",
            "write `name: {path: prefix}`, or leave it out",
        )
    sets = {}
    for name, entry in entries.items():
        key = _entry_key("validation", "a validation set", name, entry, ("path", "kind"), fail)
        if name in domains:
            advice = f"give it another name, or write the corpus as domains.{name}.valid"
            fail(key, "a domain has the same name, and both are reported under it", advice)
        path = _prefix(entry.get("path"), f"{key}.path", folder, fail)
        sets[name] = Domain(
            name, path, check_choice(entry.get("kind", "text"), KINDS, f"{key}.kind", fail)
        )
    trained = {domain.path: name for name, domain in domains.items()}
    held_out = [(f"domains.{name}.valid", domain.valid) for name, domain in domains.items()]
    for key, path in [
        *held_out,
        *((f"validation.{name}.path", entry.path) for name, entry in sets.items()),
    ]:
        if path in trained:
            fail(
                key,
                f"{path} is what domain {trained[path]!r} is trained on",
                "give text that is not trained on",
            )
    return sets


def _entry_key(
    section: str, what: str, name: Any, entry: Any, keys: Sequence[str], fail: Fail
) -> str:
    """Return the key of a named corpus, after checking its name and its keys."""
    if not isinstance(name, str):
        fail(section, f"the name {name!r} is {kind_name(name)}, not text", "put it in quotes")
    if not valid_name(name):
        fail(
            section,
            f"{name!r} is not a valid name for {what}",
            "use letters, digits, - _ and . (it becomes part of metric names)",
        )
    key = f"{section}.{name}"
    if not isinstance(entry, Mapping):
        fail(key, f"a mapping is expected, found {kind_name(entry)}", "write `{path: prefix}`")
    check_keys(entry, keys, f"{key}.", fail)
    return key


def _prefix(path: Any, key: str, folder: Path, fail: Fail) -> str:
    """Return the absolute prefix of a corpus."""
    if isinstance(path, str):
        check_one_line(path, key, fail)
    if not isinstance(path, str) or not path:
        problem = (
            "no path is given"
            if path in (None, "")
            else f"text is expected, found {kind_name(path)}"
        )
        fail(key, problem, "write the prefix of its .bin and .idx")
    for suffix in (".bin", ".idx"):
        if path.endswith(suffix):
            fail(key, f"{path!r} ends with {suffix}", "write the prefix, without the ending")
    return os.path.abspath(folder / path)


def _stage(entry: Any, key: str, domains: Mapping[str, Domain], fail: Fail) -> Stage:
    if not isinstance(entry, Mapping):
        fail(
            key,
            f"a mapping is expected, found {kind_name(entry)}",
            "write `{name: ..., at: ..., weights: {...}}`",
        )
    check_keys(entry, ("name", "at", "weights", "ramp"), f"{key}.", fail)
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        fail(
            f"{key}.name",
            "no name is given" if name in (None, "") else f"{name!r} is not a valid name",
            "give the stage a name (text)",
        )
    check_one_line(name, f"{key}.name", fail)
    key = f"{key} ({name})"
    if "at" not in entry:
        fail(
            f"{key}.at",
            "it is missing",
            "write where the stage begins, in the clock's unit or as a percentage",
        )
    at, relative = parse_position(entry["at"], f"{key}.at", fail)
    ramp = entry.get("ramp", "linear")
    if not isinstance(ramp, str) or not valid_ramp(ramp):
        nearest = suggestion(ramp, ("step", "linear", "cosine", "root2", "geometric"))
        fail(
            f"{key}.ramp",
            f"{ramp!r} is unknown{nearest}",
            f"choose one of {', '.join(RAMPS)} (root2: the square root)",
        )
    weights = entry.get("weights")
    if not isinstance(weights, Mapping):
        problem = (
            "it is missing"
            if weights is None
            else f"a mapping is expected, found {kind_name(weights)}"
        )
        fail(f"{key}.weights", problem, "write `{domain: weight, ...}`")
    checked = {}
    for domain, weight in weights.items():
        if domain not in domains:
            fail(
                f"{key}.weights",
                f"domain {domain!r} is unknown{suggestion(domain, domains)}",
                "name it under domains, or correct the name",
            )
        checked[domain] = check_number(weight, f"{key}.weights.{domain}", fail)
        if checked[domain] < 0:
            fail(f"{key}.weights.{domain}", f"{weight} is negative", "write 0 or a positive number")
    if not any(weight > 0 for weight in checked.values()):
        fail(
            f"{key}.weights", "no weight is positive", "give at least one domain a positive weight"
        )
    return Stage(name, at, checked, ramp, relative)


class _Order:
    """Checks the order of stages as far as it does not depend on the length of the run.

    A number and a percentage are compared only when the plan is made.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._latest: dict[bool, Stage] = {}

    def check(self, stage: Stage, key: str, fail: Fail) -> None:
        """Check a stage against those before it."""
        at = f"{key} ({stage.name}).at"
        if stage.name in self._names:
            fail(f"{key}.name", f"two stages are called {stage.name!r}", "give each its own name")
        if not self._names:
            if stage.at != 0:
                fail(
                    at,
                    f"the first stage begins at {_shown(stage)}",
                    "let the first stage begin at 0",
                )
            self._latest = {True: stage, False: stage}
        before = self._latest[stage.relative]
        if self._names and before.at == stage.at:
            fail(
                at,
                f"stages {before.name!r} and {stage.name!r} both begin at {_shown(stage)}",
                "move one of them, or drop it",
            )
        if before.at > stage.at:
            problem = (
                f"{_shown(stage)} comes before the stage above it, {before.name!r} at "
                f"{_shown(before)}"
            )
            fail(at, problem, "list the stages in the order in which they begin")
        self._names.add(stage.name)
        self._latest[stage.relative] = stage


def _shown(stage: Stage) -> str:
    return f"{stage.at}{'%' * stage.relative}"
