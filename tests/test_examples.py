"""The scripts of the examples that prepare text; the examples need downloads and run by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron_chatflow.curriculum import BlendPlan, load_curriculum

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = ("curriculum.yaml", "constant.yaml")
LONG = "A paragraph that is long enough to be recognized in every document, {}."


def write(path: Path, *records: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(script: str, *words: object) -> None:
    subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, words)],
        check=True,
        capture_output=True,
        timeout=60,
    )


def test_long_paragraphs_of_held_out_documents_are_removed(tmp_path: Path) -> None:
    held, free = LONG.format("held out"), LONG.format("free")
    test = write(tmp_path / "test.jsonl", {"text": f"Heading\n{held}"})
    documents = write(
        tmp_path / "a.jsonl",
        {"text": f"Heading\n{held}\n{free}", "source": "x"},
        {"text": held},
        {"text": free},
    )
    run("smollm2_zh/unseen.py", documents, documents, "--held-out", test)
    assert read(documents) == [{"text": f"Heading\n{free}", "source": "x"}, {"text": free}]
    pairs = [
        {"en": free, "hu": "b"},
        {"en": held, "hu": "b"},
        {"instruction": "a", "output": f"{free}\n{held}"},
        {"en": "Heading", "hu": "Cím"},
    ]
    run(
        "smollm2_zh/unseen.py",
        write(tmp_path / "b.jsonl", *pairs),
        tmp_path / "c.jsonl",
        "--held-out",
        test,
        test,
    )
    assert read(tmp_path / "c.jsonl") == [pairs[0], pairs[3]]


def test_every_eighth_pair_becomes_an_instruction_to_translate_and_none_is_both(
    tmp_path: Path,
) -> None:
    pairs = [{"en": f"en {i}", "hu": f"hu {i}", "source": "x"} for i in range(20)]
    run(
        "smollm2_hu/translations.py",
        write(tmp_path / "a.jsonl", *pairs),
        tmp_path / "pairs.jsonl",
        tmp_path / "instruct.jsonl",
    )
    assert read(tmp_path / "pairs.jsonl") == [
        pair for i, pair in enumerate(pairs) if i not in (0, 8, 16)
    ]
    pairs_of = [(record["input"], record["output"]) for record in read(tmp_path / "instruct.jsonl")]
    assert pairs_of == [("en 0", "hu 0"), ("hu 8", "en 8"), ("en 16", "hu 16")]


def test_the_control_of_smollm2_zh_has_the_average_shares_of_its_curriculum() -> None:
    plans = [
        BlendPlan(
            load_curriculum(EXAMPLES / "smollm2_zh" / name),
            num_samples=100_000,
            global_batch_size=8,
            seq_length=512,
        )
        for name in NAMES
    ]
    moving, constant = (
        dict(zip(plan.domain_names, plan.counts(100_000), strict=True)) for plan in plans
    )
    assert moving.keys() == constant.keys() and all(
        abs(moving[name] - constant[name]) < 100 for name in moving
    ), (moving, constant)
