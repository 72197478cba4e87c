"""`train` without training: it writes the files of a run, an iteration every few milliseconds.

It saves at every third iteration, resumes where it saved, exits with 3 at SIGTERM, and fails where
STUB_FAILS names the run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import yaml

STEP_SECONDS = float(os.environ.get("STUB_STEP_SECONDS", "0.02"))


def main(words: list[str]) -> int:
    """Write the files of the run that the settings describe."""
    assert words[:2] == ["train", "--config"], words
    settings = yaml.safe_load(Path(words[2]).read_text())
    run, last = Path(settings["checkpoint"]["save"]), settings["training"]["train_iters"]
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    print(f"OMP_NUM_THREADS {os.environ['OMP_NUM_THREADS']}", flush=True)
    if run.name in os.environ.get("STUB_FAILS", "").split():
        print("chatflow train: error: the stub fails", file=sys.stderr)
        return 1
    pointer = run / "latest_checkpointed_iteration.txt"
    done = int(pointer.read_text()) if pointer.exists() else 0
    if not done and settings["checkpoint"]["branch_from"] is not None:
        trunk = Path(settings["checkpoint"]["load"])
        assert (trunk / "latest_checkpointed_iteration.txt").exists(), "the trunk is not trained"
        done = settings["checkpoint"]["branch_from"]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    batch, length = settings["training"]["global_batch_size"], settings["data"]["seq_length"]
    with open(run / "metrics.jsonl", "a") as file:
        for iteration in range(done + 1, last + 1):
            time.sleep(STEP_SECONDS)
            tokens = iteration * batch * length
            record: dict[str, Any] = {"iteration": iteration, "consumed_samples": iteration * batch}
            domains = {"zh": {"tokens": tokens // 2}, "en": {"tokens": tokens - tokens // 2}}
            file.write(json.dumps(record | {"domains": domains}) + "\n")
            if iteration == last and settings["validation"]["eval_interval"]:
                loss = 2 + zlib.crc32(f"{run.name}/{iteration}".encode()) / 2**32
                values = {"zh": {"loss": loss, "bits_per_byte": loss / 2, "tokens": 9}}
                file.write(json.dumps({"iteration": iteration, "validation": values}) + "\n")
            file.flush()
            if iteration % 3 == 0 or iteration == last or asked:
                folder = run / f"iter_{iteration:07d}"
                folder.mkdir(exist_ok=True)
                (folder / "state.json").write_text('{"settings": {"vocab_size": 512}}')
                (run / "pointer.new").write_text(str(iteration))
                os.replace(run / "pointer.new", pointer)
            if asked and iteration < last:
                return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
