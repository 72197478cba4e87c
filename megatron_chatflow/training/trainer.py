"""A run from its configuration to its last checkpoint, in named phases.

What can be refused without torch is refused before torch is loaded, and everything is checked
before anything is written. The resume point is resolved twice: at first alone, so that an error is
reported at once, and again when the ranks are connected and the run directory is theirs, since
another run may have saved there meanwhile, and a checkpoint is read completely by all ranks only
then.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chatflow import __version__
from megatron_chatflow.config import Config, ResolvedConfig, resolve, to_yaml
from megatron_chatflow.distributed.launch import Launch, read_launch
from megatron_chatflow.errors import ChatflowError, is_shared
from megatron_chatflow.training.callbacks import Callback, CallbackList
from megatron_chatflow.training.data_setup import Inputs, open_inputs
from megatron_chatflow.training.resume_plan import data_identity
from megatron_chatflow.training.resume_point import (
    ResumePoint,
    RunForecast,
    forecast_run,
    resolve_resume_point,
)
from megatron_chatflow.utils.files import unwritable
from megatron_chatflow.utils.logging import log_notes

if TYPE_CHECKING:
    from megatron_chatflow.checkpoint.lease import Lease
    from megatron_chatflow.checkpoint.saver import Saver
    from megatron_chatflow.distributed.heartbeat import HeartbeatMonitor
    from megatron_chatflow.training.signals import StopRequest
    from megatron_chatflow.training.train_state import TrainState

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model. Every process of the job makes one and calls the same phases.

    `run` calls them all. A program that needs something between two phases calls them itself, in
    the order of `run`; each phase uses what the one before has set.
    """

    data: Inputs
    """Set by `load_data`."""
    resume_point: ResumePoint
    """Set by `resolve_resume_point`, and again by `confirm_resume_point`."""
    forecast: RunForecast
    """How far the run will get; set with `resume_point`."""
    state: TrainState
    """Set by `build`."""

    def __init__(
        self, config: ResolvedConfig, launch: Launch, callbacks: Sequence[Callback] = ()
    ) -> None:
        """Make a trainer from resolved settings; see `from_config`."""
        self.config, self.launch, self.callbacks = config, launch, list(callbacks)
        self._heartbeat: HeartbeatMonitor | None = None
        self._lease: Lease | None = None
        self._saver: Saver | None = None
        self._stop: StopRequest | None = None

    @classmethod
    def from_config(cls, config: Config, callbacks: Sequence[Callback] = ()) -> Trainer:
        """Make a trainer for this process.

        Args:
            config: settings as given; they are checked and completed here.
            callbacks: take part in the run after the built-in ones.

        Raises:
            ConfigError: the settings, or the launcher's variables, cannot be used.
        """
        launch = read_launch()
        return cls(resolve(config, launch.world_size), launch, callbacks)

    def run(self) -> bool:
        """Run all phases; returns whether the run is done, and did not exit before its end.

        Raises:
            ChatflowError: something that the user gave cannot be used.
                (a RunError among them: a run that has begun cannot continue.)
        """
        self.load_data()
        self.resolve_resume_point()
        with self.session():
            self.init_distributed()
            self.confirm_resume_point()
            self.build()
            return self.fit()

    def load_data(self) -> None:
        """Open the curriculum, the tokenizer and every corpus, and check them. Loads no torch."""
        self._begin = time.perf_counter()
        held_out = bool(self.config.validation.eval_interval)
        self.data = open_inputs(self.config, held_out=held_out)

    def resolve_resume_point(self) -> None:
        """Decide where the run begins and how far it will get. Loads no torch, writes nothing."""
        self._resolve()
        log_notes(logger, (*self.data.notes, *self.forecast.notes))
        logger.info(
            f"{len(self.data.domains)} domains, {self.forecast.total:,} samples of "
            f"{self.config.data.seq_length} tokens, opened in "
            f"{time.perf_counter() - self._begin:.2f} s"
        )

    def _resolve(self) -> None:
        self.resume_point = resolve_resume_point(self.config, self.data)
        self.forecast = forecast_run(self.resume_point, self.data)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Hold what the phases from `init_distributed` on open, and close it in order.

        An error that is a bug, or of another rank, ends this process with the reason reported once
        for the job, where there are several ranks.
        """
        from megatron_chatflow.distributed.process_groups import shut_down

        # Signals are handled to the very end: torchrun ends ranks that look for a reason.
        with ExitStack() as self._signals:
            try:
                with ExitStack() as self._resources:
                    yield
            except Exception as error:
                if self._heartbeat is not None and not is_shared(error):
                    self._heartbeat.fail(error)
                raise
            finally:
                if self._heartbeat is not None:
                    self._heartbeat.close()
                shut_down()

    def init_distributed(self) -> None:
        """Join the process groups, handle signals, and take the lease of the run directory.

        Raises:
            ConfigError: another run holds the run directory, or it cannot be written.
            LaunchError: the processes do not come together.
            WriteError: the disk is full.
        """
        from megatron_chatflow.distributed import cuda_shim, process_groups

        process_groups.hide_engine_warnings()
        cuda_shim.install()
        from megatron_chatflow.checkpoint.lease import Lease
        from megatron_chatflow.checkpoint.saver import Saver
        from megatron_chatflow.training.signals import StopRequest

        config, where = self.config, self.config.checkpoint
        if where.save:
            run = Path(where.save)
            self._lease = self._resources.enter_context(Lease(run))
            # Before the process groups: the process that writes shall share nothing of them.
            self._saver = self._resources.enter_context(
                Saver(run, where.most_recent_k, where.save_retain_interval, self._lease)
            )
        self._heartbeat = process_groups.initialize(
            self.launch, config.parallel, config.model.num_layers
        )
        limit = config.training.exit_duration_in_mins
        self._stop = self._signals.enter_context(StopRequest(limit, self._lease))
        if self._lease is not None:
            _take_lease(self._lease)

    def confirm_resume_point(self) -> None:
        """Resolve the resume point again, on all ranks together; damaged checkpoints are skipped.

        Raises:
            ConfigError: the ranks are about to run different things, or no checkpoint is intact.
        """
        from megatron_chatflow.checkpoint.state_dict import find_damage
        from megatron_chatflow.distributed.consistency_check import require_agreement

        if self._lease is not None:  # another run may have saved since
            self.resume_point = resolve_resume_point(self.config, self.data)
        start = self.resume_point
        require_agreement(_facts(start, self.data))
        damaged: dict[Path, str] = {}
        while start.checkpoint is not None and (wrong := find_damage(start.checkpoint)):
            damaged[start.checkpoint] = wrong
            start = resolve_resume_point(self.config, self.data, damaged)
        self.resume_point, self.forecast = start, forecast_run(start, self.data)
        log_notes(logger, start.notes)

    def build(self) -> None:
        """Build model, optimizer and schedule, and load the checkpoint if there is one."""
        from megatron_chatflow.training.train_state import build_train_state

        self.state = build_train_state(self.launch, self.data, self.resume_point, self.forecast)

    def fit(self) -> bool:
        """Train to the end of the run, or until a signal or a setting ends it.

        Without --save nothing is saved.

        Returns:
            Whether the run is done, and did not exit before its end.

        Raises:
            NonFiniteError: losses or gradients are not finite, or no token has loss, in more
                iterations in a row than are skipped.
            ReplicaError: replicas of the weights differ, or are not finite.
            SaveError: the last checkpoint cannot be written, or any under --exit-on-failed-save.
            LeaseLostError: the run directory is another run's by now.
            ConfigError, WriteError: the files that describe the run cannot be written.
        """
        from megatron_chatflow.training import train_loop
        from megatron_chatflow.training.checkpoint_callback import CheckpointCallback
        from megatron_chatflow.training.metrics_callback import MetricsCallback
        from megatron_chatflow.training.nonfinite_check import NonFiniteCheckCallback
        from megatron_chatflow.training.replica_check import ReplicaCheckCallback
        from megatron_chatflow.training.signals import StopCallback
        from megatron_chatflow.training.validation import ValidationCallback

        assert self._stop is not None, "init_distributed comes first"
        callbacks = CallbackList()
        callbacks.members = [
            MetricsCallback(self._lease),
            NonFiniteCheckCallback(),
            StopCallback(self._stop),
            ValidationCallback(self._stop, callbacks),
            CheckpointCallback(self._saver, callbacks),
            ReplicaCheckCallback(),
            *self.callbacks,
        ]
        return train_loop.fit(self.state, callbacks)


def _take_lease(lease: Lease) -> None:
    """Have rank 0 take the lease of the run directory; called by every rank.

    Raises on every rank alike:
        ConfigError: another run holds it, or the folder cannot be written.
        WriteError: the disk is full.
    """
    from megatron_chatflow.distributed.consistency_check import on_first_rank

    def acquire() -> None:
        try:
            lease.acquire()
        except OSError as error:
            raise unwritable("save", lease.folder, error) from None

    on_first_rank(acquire, ChatflowError)


def _facts(start: ResumePoint, inputs: Inputs) -> dict[str, str]:
    """Return what must be the same on every rank, in short forms."""
    corpora = {
        f"the corpus of {name}": fingerprint[:12]
        for name, fingerprint in data_identity(start.config, inputs)["corpora"].items()
    }
    return corpora | {
        "the version": __version__,
        "the settings": hashlib.sha256(to_yaml(start.config).encode()).hexdigest()[:12],
        "the plan": start.blend.plan.fingerprint()[:12],
        "the checkpoint": str(start.checkpoint),
    }
