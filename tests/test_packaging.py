"""What a user installs: versions, scripts, sample corpora, the image."""

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import sentencepiece
from packaging.requirements import Requirement

import megatron_chatflow

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
CORPORA = ("en", "zh", "en-zh", "instruct")


def load(path: Path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(name: str) -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {
        r.name.lower(): r
        for r in map(Requirement, (line for line in lines if line and not line.startswith("-r")))
    }


def records(name: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (QUICKSTART / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_every_requirement_is_pinned_to_one_version():
    for name, requirement in (pins("requirements.txt") | pins("requirements-dev.txt")).items():
        assert [s.operator for s in requirement.specifier] == ["=="], name


def test_the_bounds_of_the_package_admit_the_pinned_versions():
    bounds = {
        r.name.lower(): r
        for r in map(
            Requirement,
            tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"],
        )
    }
    pinned = pins("requirements.txt")
    assert set(bounds) == set(pinned)
    for name, requirement in pinned.items():
        [exact] = requirement.specifier
        assert exact.version in bounds[name].specifier, name


def test_no_requirement_names_apex():
    assert "apex" not in pins("requirements.txt") | pins("requirements-dev.txt")


def test_only_the_package_defines_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"] and "version" not in project
    assert re.fullmatch(r"\d+\.\d+\.\d+", megatron_chatflow.__version__)


@pytest.mark.parametrize("name", ["py.typed", "planner/accelerators.yaml"])
def test_the_wheel_ships_the_files_that_are_not_python(name: str):
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert name in data["package-data"]["megatron_chatflow"]
    assert (ROOT / "megatron_chatflow" / name).is_file()


def test_the_installed_command_leads_to_a_function():
    module, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][
        "chatflow"
    ].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def shell_scripts() -> list[Path]:
    found = [
        p
        for folder in ("examples", "tests", "tools")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".sh", ".sbatch")
    ]
    return sorted([*found, ROOT / ".ci" / "run"])


@pytest.mark.parametrize(
    "script", shell_scripts(), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_shell_scripts_have_no_syntax_error(script: Path):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_sample_corpora_are_small_and_hold_what_their_readme_counts():
    files = [QUICKSTART / "data" / f"{name}.jsonl" for name in CORPORA]
    assert 1_000_000 <= sum(file.stat().st_size for file in files) <= 3_000_000
    readme = (QUICKSTART / "data" / "README.md").read_text(encoding="utf-8")
    for name in CORPORA:
        assert f"| `{name}.jsonl` | {len(records(name)):,} |" in readme


def test_sources_of_the_sample_corpora_have_a_license():
    readme = (QUICKSTART / "data" / "README.md").read_text(encoding="utf-8")
    packages = {record["source"].split("/")[0] for name in CORPORA for record in records(name)}
    assert packages == {"libreoffice-help", "postgresql-doc", "zaragoza-construction-faq"}
    assert all(f"`{package}" in readme for package in packages)


def test_documents_of_the_sample_corpora_are_unique():
    pages: dict[str, str] = {}
    for name in CORPORA:
        texts = [
            json.dumps({k: v for k, v in record.items() if k != "source"}, sort_keys=True)
            for record in records(name)
        ]
        assert len(set(texts)) == len(texts)
        assert all(pages.setdefault(record["source"], name) == name for record in records(name))


def test_the_sample_tokenizer_has_llamas_special_ids_and_gives_every_text_back():
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(QUICKSTART / "tokenizer.model"))
    assert (tokenizer.vocab_size(), tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (
        4096,
        0,
        1,
        2,
    )
    for text in [record["text"] for name in ("en", "zh") for record in records(name)[:50]] + [
        "1234  ก\n\t龘🙂"
    ]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_the_sample_tokenizer_again_gives_the_same_bytes():
    model = load(QUICKSTART / "build_tokenizer.py").train()
    assert (
        hashlib.sha256(model).hexdigest()
        == hashlib.sha256((QUICKSTART / "tokenizer.model").read_bytes()).hexdigest()
    )


def test_the_corpus_builder_reads_blocks_drops_navigation_and_pairs_by_id(tmp_path: Path):
    builder = load(QUICKSTART / "build_corpora.py")
    area = (
        '<h1 id="t">Title&nbsp;here</h1><ul><li><p id="p">one '
        "<b>two</b><br>three</p></li></ul><p>Related Topics</p><p>x</p>"
    )
    (tmp_path / "page.html").write_text(
        f'<body><nav>Menu</nav><div id="A">{area}</div></body>', encoding="utf-8"
    )
    blocks = builder.read_page(tmp_path / "page.html", "A")
    assert blocks == [("t", "h1", "Title here"), ("p", "p", "one two three")]
    english = [
        builder.Block("p", "p", "Click the chart to select it."),
        builder.Block("q", "p", "This one is not translated."),
    ]
    chinese = [
        builder.Block("q", "p", "This one is not translated."),
        builder.Block("p", "p", "点击图表以选中它。"),
    ]
    assert list(builder.aligned(english, chinese, set())) == [
        ("Click the chart to select it.", "点击图表以选中它。")
    ]


def test_the_image_check_refuses_replaced_libraries_and_other_transformer_engines():
    problems = load(ROOT / "tools" / "check_image.py").problems
    image = {"torch": "2.10.0a0+b558c986e8.nv25.11", "numpy": "1.26.4"}
    assert problems(image, image, "2.9.0+70f53666", True) == []
    assert problems(image, image, "2.11.1", True) == []
    assert (
        len(problems(image, image, "2.12.0", True))
        == len(problems(image, image, "2.8.0", True))
        == 1
    )
    assert len(problems(image, image, "2.9.0", False)) == 1
    assert problems(image, image | {"numpy": "2.4.6"}, "2.9.0", True) == [
        "numpy was 1.26.4 in the base image and is 2.4.6 now"
    ]


def test_the_image_installs_every_pin_but_what_nvidia_built():
    recipe = (ROOT / "Dockerfile").read_text()
    pattern = re.search(r"grep -vE '([^']+)' requirements.txt", recipe)[1]
    left_out = {name for name in pins("requirements.txt") if re.match(pattern, f"{name}==")}
    assert left_out == {"torch", "numpy", "megatron-core"}
    assert "pip install --no-deps \"$(grep '^megatron-core==' requirements.txt)\"" in recipe


@pytest.mark.slow
def test_the_environment_script_makes_one_once_and_works_in_a_folder_with_a_space(tmp_path: Path):
    project = tmp_path / "a project"
    (project / "tools").mkdir(parents=True)
    for name in ("tools/venv.sh", "setup.py"):
        (project / name).write_text((ROOT / name).read_text())
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (project / "backend.py").write_text(BACKEND)
    (project / "requirements.txt").write_text("# nothing\n")
    script = (
        f'set -e\n. "{project}/tools/venv.sh"\nuse_environment "{project}" requirements.txt\n'
        f"command -v python\n"
    )

    def run() -> str:
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "HOME": str(tmp_path)}
        return subprocess.run(
            ["bash", "-c", script],
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout

    first, second = run(), run()
    assert "making a virtual environment" in first and "installing" in first
    assert second == f"[setup] using {project}/.venv\n{project}/.venv/bin/python\n"
    (project / "requirements.txt").write_text("# changed\n")
    third = run()
    assert "making" not in third and "installing" in third


BACKEND = '''
"""A minimal build backend: an empty editable wheel, so that the test needs no network."""
import zipfile
from pathlib import Path


WHEEL = "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"


def build_editable(folder, config_settings=None, metadata_directory=None):
    info = "p-1.dist-info"
    with zipfile.ZipFile(Path(folder) / "p-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: p\\nVersion: 1\\n")
        wheel.writestr(f"{info}/WHEEL", WHEEL)
        wheel.writestr(f"{info}/RECORD", "")
    return "p-1-py3-none-any.whl"
'''
