"""doctor: every answer with its reason, quickly, and an error for what would stop a run."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.cli.diagnostics.devices import no_cuda_reason
from megatron_chatflow.distributed.consistency_check import differences
from tests.pool import Pool, command
from tests.sample import CURRICULUM

ROWS = (
    "cores",
    "memory",
    "shared memory",
    "disk",
    "open files",
    "memory maps",
    "locked memory",
    "clock",
    "locale",
    "slurm",
    "gradient fusion",
)


def row(out: str, name: str) -> str:
    """What the table says after a name."""
    found = re.findall(rf"^{re.escape(name)} {{2,}}(.*)$", out, re.MULTILINE)
    assert len(found) == 1, out
    return found[0]


@pytest.mark.skipif(
    no_cuda_reason() is None, reason="this machine may have a GPU, so torch is asked"
)
def test_without_a_gpu_the_doctor_answers_without_torch_in_1500_ms_of_cpu_time() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import sys\nfrom megatron_chatflow.__main__ import main\nprint(main(['doctor']), "
        "'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.endswith("training: can run\n0 False\n"), done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    assert row(done.stdout, "device").startswith("cpu  (") and row(
        done.stdout, "layers"
    ).startswith("portable  (")
    assert row(done.stdout, "megatron-core") == "0.16.1"
    assert (
        row(done.stdout, "launcher")
        == "single  (neither torchrun's nor SLURM's variables are set; rank 0 of 1)"
    )
    for name in ROWS:
        row(done.stdout, name)


def test_corpora_are_opened_and_the_disk_is_compared_with_two_checkpoints(
    sample: Path, reference: Path
) -> None:
    code, out, err = command(
        "doctor", "--config", str(sample / "run.yaml"), "--save", str(reference)
    )
    assert code == 0, out + err
    for name in CURRICULUM["domains"]:
        assert re.match(
            r"[\d,]+ documents, [\d,]+ tokens  \(.*_document\)", row(out, f"corpus {name}")
        )
    assert row(out, "tokenizer").startswith("tokenizer.model ")
    found = float(re.search(r"a checkpoint of this model takes ([\d,.]+) GB", row(out, "disk"))[1])
    real = sum(path.stat().st_size for path in (reference / "iter_0000020").iterdir()) / 1e9
    assert abs(found - real) <= 0.05 + 0.05 * real
    assert "4 corpora are mapped" in row(out, "open files") and row(out, "memory maps").endswith(
        "(corpora take 8)"
    )


def test_a_damaged_corpus_and_another_tokenizer_are_named(sample: Path, tmp_path: Path) -> None:
    for path in sample.glob("*_document.*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "curriculum.yaml").write_text(
        yaml.safe_dump(CURRICULUM, sort_keys=False), encoding="utf-8"
    )
    words = ["doctor", "--curriculum", str(tmp_path / "curriculum.yaml")]
    manifest = tmp_path / "en_text_document.json"
    manifest.write_text(re.sub(r'"hash": "\w{8}', '"hash": "00000000', manifest.read_text()))
    code, out, _ = command(*words)
    assert code == 1 and out.endswith(
        "training: cannot run, see above: tokenizer 2 different ones\n"
    )
    assert re.search(r"tokenizer\.model 00000000: en;", row(out, "tokenizer"))
    cut = tmp_path / "zh_text_document.bin"
    cut.write_bytes(cut.read_bytes()[:-10])
    (tmp_path / "enzh_text_document.idx").unlink()
    code, out, _ = command(*words)
    assert (
        code == 1
        and "truncated" in row(out, "corpus zh")
        and "does not exist" in row(out, "corpus en-zh")
    )
    assert out.endswith(
        "training: cannot run, see above: corpus zh cannot be read; corpus en-zh cannot be read\n"
    )


def test_a_curriculum_file_that_says_something_wrong_is_refused(tmp_path: Path) -> None:
    code, out, err = command("doctor", "--curriculum", str(tmp_path / "none.yaml"))
    assert (code, out) == (2, "") and "none.yaml" in err


def meet(prefixes: list[str]) -> tuple[int, str, str]:
    """`doctor --full` on this rank, with its own corpus."""
    import os

    return command(
        "doctor", "--full", "--data-path", prefixes[int(os.environ["RANK"]) % len(prefixes)]
    )


def test_the_processes_meet_and_a_corpus_that_is_not_the_same_everywhere_is_found(
    pool: Pool, sample: Path, tmp_path: Path
) -> None:
    english = str(sample / "en_text_document")
    first, second = pool.run(2, meet, [english])
    assert first[0] == 0 and row(first[1], "meeting").startswith("2 of 2  (1 host, gloo, ")
    assert row(first[1], "launcher").startswith("torchrun ") and row(
        first[1], "meeting point"
    ).startswith("127.0.0.1:")
    assert first[1].endswith("training: can run\n") and second == (0, "", "")
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(sample / f"zh_text_document{suffix}", tmp_path / f"en_text_document{suffix}")
    first, second = pool.run(2, meet, [english, str(tmp_path / "en_text_document")])
    assert first[0] == second[0] == 1
    assert re.search(
        r"^  corpus en_text_document +differs  \(\w+ on \S+ \(rank 0\); \w+ on \S+ \(rank 1\)\)$",
        first[1],
        re.MULTILINE,
    ), first[1]


def test_the_full_table_imports_the_engine(pool: Pool) -> None:
    ((code, out, _),) = pool.run(1, command, "doctor", "--full")
    assert code == 0, out
    assert row(out, "collectives").endswith("(gloo is used on this device)") and row(
        out, "imports"
    ).startswith("tried")
    assert row(out, "meeting").startswith("1 of 1  (1 host, gloo, ")


FACTS = st.fixed_dictionaries(
    {"a": st.sampled_from("xy"), "b": st.sampled_from("xyz")}, optional={"c": st.just("x")}
)


@given(st.lists(FACTS, min_size=1, max_size=6))
def test_a_difference_is_reported_exactly_where_there_is_one_and_names_every_value(
    facts: list[dict[str, str]],
) -> None:
    found = differences([(f"n{rank // 2}", fact) for rank, fact in enumerate(facts)])
    for name in ("a", "b", "c"):
        values = [fact.get(name, "nothing") for fact in facts]
        assert (name in found) == (len(set(values)) > 1)
        if name in found:
            assert {part.split(" on ")[0] for part in found[name].split("; ")} == set(values)
