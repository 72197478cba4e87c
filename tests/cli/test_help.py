"""What every command shows in its help and which flags it accepts."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_chatflow.__main__ import COMMANDS, usage
from megatron_chatflow.cli import completion, preprocess, tokenizer
from megatron_chatflow.config import Config, make_parser, parse, to_yaml
from megatron_chatflow.config.command_settings import (
    READS,
    common_settings_of,
    readers_of,
    settings_of,
)
from megatron_chatflow.config.schema import section_of
from megatron_chatflow.errors import ConfigErrors
from tests.pool import command

ROOT = Path(__file__).parents[2]
TOOLS = {
    "preprocess_data.py": "preprocess",
    "merge_datasets.py": "corpus merge",
    "verify_dataset.py": "corpus verify",
    "extend_tokenizer.py": "tokenizer extend",
    "convert_checkpoint.py": "convert",
    "plot_run.py": "plot",
    "compare_runs.py": "compare",
    "fit_scaling_law.py": "fit",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_two_screens_and_ends_with_examples(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = command(*name.split(), "--help")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100
    assert f"chatflow {name}" in lines[0] and "exit codes:" in out
    assert out.index("examples:") > out.index("  -h, --help")
    code, complete, _ = command(*name.split(), "--help-all")
    assert code == 0 and len(complete.splitlines()) >= len(lines) - 2


@pytest.mark.parametrize("name", COMMANDS)
def test_help_loads_neither_numpy_nor_torch(name: str) -> None:
    code = (
        "import sys\nfrom megatron_chatflow.__main__ import main\n"
        f"try: main({[*name.split(), '--help']!r})\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


def test_the_list_of_commands_takes_less_than_0_3_seconds() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "megatron_chatflow", "--help"], capture_output=True, text=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stdout == usage() and done.returncode == 0
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3


@pytest.mark.parametrize(
    ("name", "flag", "value"),
    [
        ("plan", "--lr", "3"),
        ("plan", "--fp8-format", "hybrid"),
        ("locate", "--load", "runs/zh"),
        ("evaluate", "--train-iters", "10"),
        ("generate", "--fp8-format", "hybrid"),
        ("doctor", "--micro-batch-size", "2"),
    ],
)
def test_a_setting_that_a_command_does_not_read_is_refused(
    name: str, flag: str, value: str
) -> None:
    code, out, err = command(name, flag, value)
    assert code == 2 and out == ""
    (line,) = (line for line in err.splitlines() if f": {flag}: " in line)
    assert f"chatflow {name} does not read this setting" in line
    assert "train" in line and name not in readers_of(flag[2:].replace("-", "_"))


def test_the_file_of_a_run_is_accepted_by_every_command(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    config = Config().replace(num_layers=4, lr=1e-3, fp8_format="hybrid", eval_interval=5)
    path.write_text(to_yaml(config), encoding="utf-8")
    for name in READS:
        parser = make_parser(f"chatflow {name}", "", command=name)
        assert parse(parser, ["--config", str(path)])[0] == config


def test_help_shows_settings_that_the_command_reads() -> None:
    for name in READS:
        assert common_settings_of(name) <= settings_of(name) <= set(section_of())


def test_all_errors_of_a_command_line_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("modle: {}\nmodel: {num_layers: four, num_layr: 2}\n")
    parser = make_parser("chatflow preflight", "", command="preflight")
    parser.add_argument("--world-size", type=int, required=True, metavar="N")
    words = ["--config", str(path), "--num-head", "4", "--lr", "fast", "--fp16", "--seed"]
    with pytest.raises(ConfigErrors) as error:
        parse(parser, words)
    text = "\n".join(error.value.messages)
    for part in (
        "unknown section 'modle'; did you mean model?",
        "model.num_layers: 'four' is not an integer",
        "unknown setting 'num_layr' in section model; did you mean num_layers?",
        "unknown flag --num-head",
        "--lr: 'fast' is not a number",
        "--fp16: only bfloat16",
        "--seed: expected one argument",
        "--world-size is missing; give --world-size N",
    ):
        assert part in text
    assert len(error.value.messages) == 8


def test_contradictions_are_reported_with_the_errors_of_the_command_line() -> None:
    words = "--num-layers 2 --hidden-size 7 --num-attention-heads 2 --seq-length 8 --learn 1"
    code, out, err = command("train", *words.split())
    lines = err.splitlines()
    assert code == 2 and out == "" and len(lines) == 4
    assert all(line.startswith("chatflow train: error: ") for line in lines)
    for part in ("unknown flag --learn", "hidden_size 7 is not", "lr is missing", "has no length"):
        assert part in err


def test_consequences_of_a_value_that_cannot_be_read_are_not_reported() -> None:
    code, _, err = command("plan", "--seq-length", "many", "--train-iters", "10")
    assert code == 2 and "seq_length is missing" not in err
    assert "--seq-length: 'many' is not an integer" in err


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_is_an_alias_that_names_itself(tool: str) -> None:
    call, name = [sys.executable, ROOT / "tools" / tool], TOOLS[tool]
    done = subprocess.run([*call, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: python tools/{tool}" in done.stdout
    assert "chatflow " + name not in done.stdout
    code, out, _ = command(*name.split(), "--help")
    assert (code, out.startswith(f"usage: chatflow {name}")) == (0, True)
    done = subprocess.run([*call, "--no-such-flag"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{tool}: error: unknown flag --no-such-flag")
    code, _, err = command(*name.split(), "--no-such-flag")
    assert code == 2 and err.startswith(f"chatflow {name}: error: unknown flag --no-such-flag")
    assert len((ROOT / "tools" / tool).read_text(encoding="utf-8").splitlines()) < 20


def test_groups_list_their_commands_and_suggest_one() -> None:
    code, out, _ = command("corpus", "--help")
    assert code == 0 and "corpus merge" in out and "corpus verify" in out and "train" not in out
    code, _, err = command("corpus", "verfy")
    assert code == 2 and "did you mean corpus verify?" in err
    assert command("tokenizer")[0] == 2


def test_what_help_shows_of_preprocessing_is_what_preprocessing_does() -> None:
    from megatron_chatflow.data.preprocess import encoder, input_files, options
    from megatron_chatflow.tokenizer import extend

    assert preprocess.KINDS == encoder.KINDS and preprocess.FORMATS == input_files.FORMATS
    assert preprocess.DEFAULTS == {
        "max_document_bytes": input_files.MAX_DOCUMENT_BYTES,
        "max_malformed": options.DEFAULT_MAX_MALFORMED,
        "seed": options.DEFAULT_SEED,
    }
    assert set(tokenizer.EXTENDABLE) == set(extend.EXTENDABLE)


def _complete(*words: str) -> list[str]:
    """Return what bash offers for the last word, from the script that the command prints."""
    shown = " ".join(f"'{word}'" for word in words)
    script = f"""
        eval "$({sys.executable} -m megatron_chatflow completion bash)"
        COMP_WORDS=({shown}); COMP_CWORD={len(words) - 1}
        $(complete -p chatflow | sed -E 's/.*-F ([^ ]+).*/\\1/') chatflow '{words[-1]}' ''
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


def test_bash_completes_commands_flags_and_choices() -> None:
    assert {"plan", "plot"} <= set(_complete("chatflow", "pl")) <= {"plan", "plot"}
    assert _complete("chatflow", "corpus", "v") == ["verify"]
    assert _complete("chatflow", "plan", "--curr") == ["--curriculum"]
    assert "--lr" not in _complete("chatflow", "plan", "--l")
    assert _complete("chatflow", "train", "--fp8-format", "h") == ["hybrid"]


def test_the_completion_of_zsh_holds_every_command() -> None:
    code, out, err = command("completion", "zsh")
    assert (code, err) == (0, "") and out.startswith("#compdef chatflow")
    assert all(f'"{name.split()[-1]}:' in out or f"{name.split()[-1]}:" in out for name in COMMANDS)
    code, _, err = command("completion", "fish")
    assert code == 2 and ", ".join(completion.SHELLS) in err
