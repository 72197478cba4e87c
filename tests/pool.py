"""One pool of gloo ranks for all tests of a process.

Importing megatron-core costs seconds per rank, so it is done once.

A job is a function and its arguments, run on the first `world_size` ranks under torchrun's
environment variables (one rank alone gets none of them, as a plain command would). Jobs leave their
process groups; the pool checks that they did.
"""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any


class Pool:
    """Processes that are started when first needed, as many as the largest job so far wanted."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Any]] = []

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0
    ) -> list[Any]:
        """The results of `function(*args)`, called on `world_size` ranks at once, in order of rank.
        A rank's exception is raised here.
        """
        self._start(world_size - len(self._workers))
        port = _free_port()
        workers = self._workers[:world_size]
        for rank, (_, pipe) in enumerate(workers):
            pipe.send((function, args, rank, world_size, port))
        results, failures = [], []
        for rank, (process, pipe) in enumerate(workers):
            if not pipe.poll(timeout) or not process.is_alive():
                self.close()
                raise RuntimeError(
                    f"rank {rank} of {function.__name__}{args} did not answer in {timeout} s"
                )
            ok, value = pipe.recv()
            (results if ok else failures).append(value)
        if failures:
            raise RuntimeError("\n".join(failures))
        return results

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        new = len(self._workers)
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there,), daemon=False)
            process.start()
            self._workers.append((process, here))
        for process, pipe in self._workers[new:]:  # the ranks of a job wait a minute for each other
            if not pipe.poll(240) or pipe.recv() != "ready":
                raise RuntimeError(f"a rank of the tests, process {process.pid}, does not start")

    def close(self) -> None:
        """End every process."""
        for process, pipe in self._workers:
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(5)
            process.kill()
        self._workers = []


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _work(pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from megatron_chatflow.distributed import cuda_shim, process_groups

    torch.set_num_threads(1)
    cuda_shim.install()
    import megatron_chatflow.training.train_loop  # noqa: F401  so that every job finds it loaded

    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        function, args, rank, world_size, port = job
        launch = (
            {
                "RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_RANK": rank,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            if world_size > 1
            else {}
        )
        os.environ.update({key: str(value) for key, value in launch.items()})
        try:
            answer = (True, function(*args))
            assert not torch.distributed.is_initialized(), (
                f"{function.__name__} left a process group behind"
            )
        except BaseException:
            answer = (False, f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
            process_groups.shut_down()
        for key in launch:
            del os.environ[key]
        _free_groups()
        pipe.send(answer)


def _free_groups() -> None:
    """Let go of what holds a job's process groups: cycles, and a cache of megatron-core's.

    Every gloo group that is left has threads that wake a hundred times a second; after some hundred
    jobs nothing else would run.
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding.forward.cache_clear()
    gc.collect()


def command(*words: str) -> tuple[int, str, str]:
    """Run the command line in this process: (exit code, standard output, standard error)."""
    from megatron_chatflow.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()
