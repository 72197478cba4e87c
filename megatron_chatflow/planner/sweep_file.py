"""The file of `chatflow sweep`: sizes, lengths, shares and seeds, read and checked.

Every error is one message with file, key, value and what to do. Nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_chatflow.config import Config, load_values, make_config
from megatron_chatflow.config.schema import section_of
from megatron_chatflow.curriculum import Curriculum, load_curriculum
from megatron_chatflow.curriculum.checks import (
    Fail,
    check_keys,
    check_number,
    kind_name,
    suggestion,
)
from megatron_chatflow.curriculum.parser import parse_curriculum
from megatron_chatflow.errors import ChatflowError, ConfigError, messages_of
from megatron_chatflow.utils.user_files import (
    absolute_path,
    check_line,
    load_yaml,
    read_text,
    valid_name,
    visible,
)

KEYS = (
    "base", "curriculum", "runs", "sizes", "tokens", "cooldown", "shares", "seeds", "start",
    "target", "keep", "processes",
)  # fmt: skip
_SET = """
    save load branch_from finetune ckpt_step no_load_optim no_save_optim train_iters train_samples
    rampup_batch_size seed seq_length curriculum data_path amend_curriculum lr_decay_style
    lr_decay_iters lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples exit_interval
    exit_duration_in_mins override_opt_param_scheduler use_checkpoint_opt_param_scheduler"""
SET_BY_SWEEP = frozenset(_SET.split())
"""Settings that a size may not have: the sweep sets them, or they are the same for all runs."""


@dataclass(frozen=True)
class Sweep:
    """What the file says."""

    source: str
    base: Config
    """Settings of every run, as written."""
    runs: Path
    """Folder of the run directories and of the table."""
    sizes: Mapping[str, Config]
    """{name: the base with the settings of the size}."""
    tokens: tuple[int, ...]
    """Lengths of training, ascending."""
    cooldown: float
    """Fraction of each length over which the learning rate decays."""
    curricula: Mapping[str, Mapping[str, Any]]
    """{name of the share: content of its curriculum file}; the name is empty without `shares`."""
    seeds: tuple[int, ...]
    names_seeds: bool
    """Whether the file gives seeds, which are then part of the names of runs."""
    start: str | None
    """Run directory whose weights the runs start with; {size}, {share} and {seed} are filled in."""
    target: str | None
    """Domain of the column `share`."""
    keep: tuple[str, ...]
    """Domains whose shares add up to the column `replay`."""
    processes: int
    """Processes of each run."""


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep file; docs/scaling_laws.md describes it. Relative paths are relative to it.

    Raises:
        ConfigError: the file, its base or its curriculum cannot be used.
    """
    path = Path(path)
    try:
        mapping = load_yaml(read_text(path))
    except ChatflowError as error:
        raise ConfigError(f"{path}: {error}; give the path of a sweep file") from None

    def fail(key: str, problem: str, advice: str) -> NoReturn:
        raise ConfigError(visible(f"{path}: {key}: {problem}; {advice}"))

    if not isinstance(mapping, Mapping):
        fail("sweep", f"a mapping is expected, found {kind_name(mapping)}", "write base and sizes")
    check_keys(mapping, KEYS, "", fail)
    for key in ("base", "runs", "sizes", "tokens"):
        if mapping.get(key) in (None, {}, []):
            fail(key, "it is missing", f"write `{key}: ...` (see chatflow sweep --help)")
    folder = path.parent
    base = Config().replace(**load_values(Path(_path(mapping["base"], "base", folder, fail))))
    if "curriculum" in mapping:
        base = base.replace(curriculum=_path(mapping["curriculum"], "curriculum", folder, fail))
    curriculum = _base_curriculum(base, fail)
    domains = tuple(parse_curriculum(curriculum, source=str(path), folder=folder).domains)
    seeds = _seeds(mapping.get("seeds"), base.training.seed, fail)
    target, keep = mapping.get("target"), mapping.get("keep", [])
    if not isinstance(keep, list):
        fail("keep", f"a list is expected, found {kind_name(keep)}", "write `keep: [en]`")
    for key, name in [("target", target)] * (target is not None) + [("keep", k) for k in keep]:
        if name not in domains:
            fail(key, f"domain {name!r} is unknown{suggestion(name, domains)}", _named(domains))
    cooldown = check_number(mapping.get("cooldown", 0.2), "cooldown", fail)
    if not 0 < cooldown < 1:
        fail("cooldown", f"{cooldown} is not between 0 and 1", "write a fraction such as 0.2")
    return Sweep(
        source=str(path),
        base=base,
        runs=Path(_path(mapping["runs"], "runs", folder, fail)),
        sizes=_sizes(mapping["sizes"], base, fail),
        tokens=_tokens(mapping["tokens"], fail),
        cooldown=cooldown,
        curricula=_curricula(mapping.get("shares"), curriculum, domains, fail),
        seeds=seeds,
        names_seeds="seeds" in mapping,
        start=_path(mapping["start"], "start", folder, fail) if "start" in mapping else None,
        target=target,
        keep=tuple(keep),
        processes=_count(mapping.get("processes", 1), "processes", fail),
    )


def _named(domains: tuple[str, ...]) -> str:
    return f"the curriculum's domains are {', '.join(domains)}"


def _path(value: Any, key: str, folder: Path, fail: Fail) -> str:
    if not isinstance(value, str) or not value:
        fail(key, f"a path is expected, found {kind_name(value)}", "write a path")
    check_line(key, value)
    return absolute_path(value, folder)


def _count(value: Any, key: str, fail: Fail) -> int:
    number = check_number(value, key, fail)
    if number != int(number) or number < 1:
        fail(key, f"{value} is not a whole number from 1 up", "write one")
    return int(number)


def _tokens(value: Any, fail: Fail) -> tuple[int, ...]:
    lengths = value if isinstance(value, list) else [value]
    found = [_count(length, f"tokens[{i}]", fail) for i, length in enumerate(lengths, 1)]
    if len(set(found)) < len(found):
        fail("tokens", f"{value} has a length twice", "write each once")
    return tuple(sorted(found))


def _seeds(value: Any, default: int, fail: Fail) -> tuple[int, ...]:
    if value is None:
        return (default,)
    if not isinstance(value, list) or not value:
        fail("seeds", f"a list is expected, found {kind_name(value)}", "write `seeds: [1, 2]`")
    for i, seed in enumerate(value, 1):
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            fail(f"seeds[{i}]", f"{seed!r} is not a whole number from 0 up", "write one")
    if len(set(value)) < len(value):
        fail("seeds", f"{value} has a seed twice", "write each once")
    return tuple(value)


def _check_name(name: Any, key: str, fail: Fail) -> None:
    """Check a name that becomes part of the name of a run directory."""
    if not isinstance(name, str) or not valid_name(name) or name.startswith((".", "-")):
        fail(key, f"{name!r} is not a valid name", "use letters, digits, - _ and .")


def _sizes(value: Any, base: Config, fail: Fail) -> dict[str, Config]:
    if not isinstance(value, Mapping):
        fail("sizes", f"a mapping is expected, found {kind_name(value)}", "write `name: {...}`")
    values = {name: getattr(getattr(base, section), name) for name, section in section_of().items()}
    sizes = {}
    for name, settings in value.items():
        key = f"sizes.{name}"
        _check_name(name, key, fail)
        if not isinstance(settings, Mapping):
            problem = f"a mapping is expected, found {kind_name(settings)}"
            fail(key, problem, "write settings, e.g. `{num_layers: 4, hidden_size: 64}`")
        for setting in settings:
            if setting in SET_BY_SWEEP:
                fail(f"{key}.{setting}", "it is the same for all sizes", "write it in the base")
        try:
            sizes[name] = make_config(settings, values)
        except ConfigError as error:
            fail(key, "; ".join(messages_of(error)), "correct it")
    return sizes


def _base_curriculum(base: Config, fail: Fail) -> dict[str, Any]:
    """Return the content of the base's curriculum file, with absolute paths."""
    path = base.data.curriculum
    if path is None:
        problem = "neither the sweep nor its base names one"
        fail("curriculum", problem, "write `curriculum: curriculum.yaml`")
    load_curriculum(path)
    content = load_yaml(read_text(path))
    for entry in (*content["domains"].values(), *(content.get("validation") or {}).values()):
        for key in ("path", "valid"):
            if key in entry:
                entry[key] = absolute_path(entry[key], Path(path).parent)
    return content


def _curricula(
    shares: Any, base: dict[str, Any], domains: tuple[str, ...], fail: Fail
) -> dict[str, Mapping[str, Any]]:
    if shares is None:
        return {"": base}
    if not isinstance(shares, Mapping) or not shares:
        problem = f"a mapping is expected, found {kind_name(shares)}"
        fail("shares", problem, "write `name: {domain: weight, ...}`")
    found = {}
    for name, weights in shares.items():
        key = f"shares.{name}"
        _check_name(name, key, fail)
        if not isinstance(weights, Mapping):
            fail(key, f"a mapping is expected, found {kind_name(weights)}", "write weights")
        content = {k: v for k, v in base.items() if k not in ("stages", "preset")}
        stages = [{"name": str(name), "at": 0, "weights": dict(weights)}]
        try:
            parse_curriculum(content | {"stages": stages}, source="shares", folder=Path())
        except ConfigError as error:
            text = str(error).removeprefix("shares: ").replace(f"stages[1] ({name}).weights", "")
            raise ConfigError(f"{key}{text if text[0] in '.:' else f': {text}'}") from None
        found[name] = content | {"stages": stages}
    return found


def relative_stages(curriculum: Mapping[str, Any]) -> list[str]:
    """Return the names of the stages at a percentage of the run."""
    parsed: Curriculum = parse_curriculum(curriculum, source="curriculum", folder=Path())
    return [stage.name for stage in parsed.stages if stage.relative]
