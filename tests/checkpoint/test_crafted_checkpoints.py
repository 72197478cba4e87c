"""Every command that opens a checkpoint refuses one that was made to run code."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.checkpoint.crafted import exploit, rewrite_manifest
from tests.pool import Pool, command
from tests.sample import train


def convert(source: Path, target: Path) -> tuple[int, str, str]:
    """tools/convert_checkpoint.py in this process."""
    import contextlib
    import io

    from megatron_chatflow.cli.convert import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["--load-dir", str(source), "--save-dir", str(target)])
    return code, out.getvalue(), err.getvalue()


def open_everywhere(sample: Path, run: Path) -> list[tuple[int, str, str]]:
    """What each command makes of a run directory."""
    return [
        train(sample, "--load", str(run), "--finetune"),
        train(sample, "--load", str(run)),
        command("evaluate", "--load", str(run)),
        command("generate", "--load", str(run), "--prompt", "A", "--max-new-tokens", "2"),
        convert(run, run.parent / "converted"),
    ]


def test_no_command_runs_what_a_checkpoint_packs(
    pool: Pool, reference: Path, tmp_path: Path
) -> None:
    run, marker = tmp_path / "evil", tmp_path / "executed"
    shutil.copytree(reference, run)
    exploit(run / "iter_0000020", marker)
    rewrite_manifest(run / "iter_0000020")
    (results,) = pool.run(1, open_everywhere, reference.parent, run)
    for code, _, err in results:
        assert code == 2 and "is stored through ['stream.zstd/1']" in err, (code, err)
    assert not marker.exists() and not (tmp_path / "converted").exists()
