"""Lines on the console: Megatron's own, and what this package adds.

Plain values in, text out.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO


class _Lossy:
    """A text stream that drops what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno in (errno.EIO, errno.EPIPE):  # for good: the terminal or the reader is gone
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextlib.contextmanager
def lossy_output() -> Iterator[None]:
    """Inside, a terminal or a reader that is gone, or a full disk, does not end the program.

    An ssh session that drops closes the terminal before the program gets SIGHUP, and Ctrl-C in
    `chatflow train | tee log` ends tee: the run must still save.
    """
    with (
        contextlib.redirect_stdout(_Lossy(sys.stdout)),
        contextlib.redirect_stderr(_Lossy(sys.stderr)),
    ):
        yield


def say(text: str) -> None:
    """Print one line and flush it."""
    print(text, flush=True)


def complain(text: str) -> None:
    """Print one line to standard error and flush it."""
    print(text, file=sys.stderr, flush=True)


def iteration_line(values: Mapping[str, Any], now: datetime.datetime) -> str:
    """Return Megatron's line of an iteration, as log parsers know it, with tokens per second.

    Args:
        values: iteration, train_iters, consumed_samples, seconds (mean per step),
            tokens_per_second, throughput (TFLOP/s of one process, or None),
            learning_rate, global_batch_size, loss, grad_norm (None where no step was taken),
            skipped and nan (iterations since the line before).
        now: the time to print.
    """
    loss = "-" if values["loss"] is None else f"{values['loss']:.6E}"
    grad_norm = "-" if values["grad_norm"] is None else f"{values['grad_norm']:.3f}"
    throughput = (
        f" throughput per GPU (TFLOP/s/GPU): {values['throughput']:.1f} |"
        if values["throughput"] is not None
        else ""
    )
    return (
        f" [{now:%Y-%m-%d %H:%M:%S}] iteration "
        f"{values['iteration']:8d}/{values['train_iters']:8d} | "
        f"consumed samples: {values['consumed_samples']:12d} |"
        f" elapsed time per iteration (ms): {values['seconds'] * 1000:.1f} |{throughput} "
        f"tokens per second: {values['tokens_per_second']:.0f} |"
        f" learning rate: {values['learning_rate']:.6E} | global batch size: "
        f"{values['global_batch_size']:5d} | lm loss: {loss} |"
        f" loss scale: 1.0 | grad norm: {grad_norm} |"
        f" number of skipped iterations: {values['skipped']:3d} | number of nan iterations: "
        f"{values['nan']:3d} |"
    )


def progress_line(
    fraction: float, seconds_left: float, stage: str, domains: Mapping[str, Mapping[str, float]]
) -> str:
    """Return how far the run is, and each domain's share and loss.

    Args:
        fraction: of the run's samples, 0 to 1.
        seconds_left: estimate.
        stage: name of the curriculum's stage.
        domains: {name: {"share", "loss"}}; loss may be missing where the domain gave no token.
    """
    parts = [
        f"{name} {v['share']:.0%}" + (f" loss {v['loss']:.3f}" if v.get("loss") is not None else "")
        for name, v in domains.items()
        if v["share"] > 0
    ]
    return (
        f"   {fraction:6.1%} done | time left {duration(seconds_left)} | stage {stage} | "
        f"{' | '.join(parts)}"
    )


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss, with days in front if there are any."""
    days, rest = divmod(int(round(max(0.0, seconds))), 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {text}" if days else text


def validation_lines(
    iteration: int,
    results: Mapping[str, Mapping[str, float | None]],
    total: Mapping[str, float | None],
) -> list[str]:
    """Return Megatron's validation line, then a line per domain and named validation set.

    Args:
        iteration: iterations done.
        results: {name: {"loss" in nats, "ppl", "bits_per_byte" or None, "tokens"}}.
        total: the same over all tokens of all domains; loss None where no domain holds any out.
    """
    over_domains = (
        f" lm loss value: {total['loss']:.6E} | lm loss PPL: {total['ppl']:.6E} |"
        if total["loss"] is not None
        else ""
    )
    lines = [f" validation loss at iteration {iteration} |{over_domains}"]
    width = max(map(len, results), default=0)
    for name, r in results.items():
        bits = (
            f" | bits per byte {r['bits_per_byte']:.4f}"
            if r.get("bits_per_byte") is not None
            else ""
        )
        lines.append(
            f"   {name:<{width}} | loss {r['loss']:.4f} | perplexity {r['ppl']:10.2f}{bits} "
            f"| {r['tokens']:.0f} tokens"
        )
    return lines
