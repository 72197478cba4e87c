"""The writer of job scripts, with values from anywhere: none is executed, all arrive letter for
letter.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import unicodedata
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_chatflow.cli.slurm_script import Job, render
from megatron_chatflow.errors import ChatflowError
from tests.pool import command
from tests.sample import SETTINGS

SHELL = "'\"$`\\ ;&|<>()*?[]{}~!#%=:-"
ATTACKS = [
    "$(touch PWN)",
    "`touch PWN`",
    "a'; touch PWN; '",
    'a"; touch PWN; "',
    "a\\",
    "#",
    "${IFS}",
    "$HOME",
    "'\"'\"'",
    "a hetjob b",
    "--load",
    "",
]
CONTROLS = ["\n", "\r", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\u2029", "\udc80"]
printable = st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])
words = st.sampled_from(ATTACKS) | st.text(st.sampled_from(SHELL) | printable, max_size=20)
STUB = '#!/bin/sh\nprintf "%s\\0" "$@" > "$LOG"\n'
SCONTROL = "#!/bin/sh\necho node1\n"


def sbatch_words(line: str) -> list[str]:
    """The words of an #SBATCH line as sbatch's own `_get_argument` reads them (SLURM 23.11)."""
    found, word, quote, escaped = [], None, "", False
    for c in line.removeprefix("#SBATCH") + " ":
        if escaped:
            word, escaped = (word or "") + c, False
        elif c == "\\":
            escaped = True
        elif quote:
            quote, word = ("", word or "") if c == quote else (quote, (word or "") + c)
        elif c in "\"'":
            quote, word = c, word or ""
        elif c == "#":
            break
        elif c in " \t\n\v\f\r":
            found, word = found + [word] * (word is not None), None
        else:
            word = (word or "") + c
    assert not quote and not escaped
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    (folder / "bin").mkdir()
    for name, text in (("srun", STUB), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "work").mkdir()
    return folder


def run(place: Path, script: str) -> list[str]:
    """Run a script with a stub for srun; the words that srun got."""
    (place / "script").write_text(script, encoding="utf-8")
    environment = {
        "PATH": f"{place / 'bin'}:/usr/bin:/bin",
        "LOG": str(place / "words"),
        "LC_ALL": "C.UTF-8",
    }
    environment |= {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node1", "SLURM_CPUS_PER_TASK": "1"}
    call = {"env": environment, "cwd": place / "work", "capture_output": True, "timeout": 60}
    assert subprocess.run(["bash", "-n", place / "script"], **call).stderr == b""
    done = subprocess.run(["bash", place / "script"], **call)
    assert (done.returncode, done.stderr) == (0, b"")
    assert os.listdir(place / "work") == []
    return (place / "words").read_bytes().decode().split("\0")[:-1]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    arguments=st.lists(words, min_size=1, max_size=5),
    save=words.filter(lambda word: "\\" not in word),
    folder=words,
    container=words,
    mounts=words,
    sbatch=st.lists(words, max_size=3),
)
def test_values_are_not_executed_and_arrive_letter_for_letter(
    place: Path,
    arguments: list[str],
    save: str,
    folder: str,
    container: str,
    mounts: str,
    sbatch: list[str],
):
    save, folder = f"/none/{save}", f"/none/{folder}"
    job = Job(arguments, save, folder, 2, 8, 8, 4, 300, container, mounts, sbatch)
    script = render(job)
    got = run(place, script)
    assert got[got.index("chatflow") :] == ["chatflow", "train", *arguments]
    if container:
        expected = [f"--container-image={container}", f"--container-workdir={folder}"]
        assert [w for w in got if w.startswith("--container-")][:2] == expected
        assert not mounts or f"--container-mounts={mounts}" in got
    head = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert not any("hetjob" in line or "packjob" in line for line in head)
    assert [f"--chdir={folder}"] in map(sbatch_words, head)
    assert [f"--output={save.replace('%', '%%')}/slurm-%j.log"] in map(sbatch_words, head)
    tail = head[head.index("#SBATCH --requeue") + 1 :]
    assert [word for line in tail for word in sbatch_words(line)] == sbatch


JOB = Job(["--lr", "1"], "/runs/a", "/home", 1, 1, 0, 1, 60, "image", "/a:/a", ["--time=1"])


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("field", ["words", "save", "folder", "container", "mounts", "sbatch"])
def test_a_control_character_is_refused_whatever_it_is_in(field: str, control: str):
    text = f"x{control}$(touch PWN){control}#"
    value = [text] if field in ("words", "sbatch") else text
    with pytest.raises(ChatflowError, match="holds") as error:
        render(dataclasses.replace(JOB, **{field: value}))
    assert not any(unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") for c in str(error.value))


@pytest.mark.parametrize(
    "flags", [["--save", "x\n$(touch PWN)\n#"], ["--save", "x", "--", "--comment=a\ntouch PWN"]]
)
def test_submit_refuses_a_newline_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
):
    monkeypatch.chdir(tmp_path)
    run = SETTINGS | {
        "training": SETTINGS["training"] | {"micro_batch_size": 2},
        "checkpoint": {"save_interval": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    layout = ["--nodes", 2, "--ntasks-per-node", 2]
    code, out, err = command("submit", "--config", "run.yaml", *layout, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "holds '\\n'" in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_backslash_in_the_run_directory_is_refused():
    with pytest.raises(ChatflowError, match="save: .* holds a backslash"):
        render(dataclasses.replace(JOB, save="/runs/a\\b"))
