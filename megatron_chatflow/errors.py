"""Errors that a user can fix, and exit codes.

A ChatflowError is printed as one message without a traceback. Every other exception is a bug and
keeps its traceback; it exits with EXIT_FAILED, as Python does.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

EXIT_FAILED = 1
"""Exit code where the work failed: a full disk, a malformed record, a lost lease, or a bug."""
EXIT_USAGE = 2
"""Exit code where flags, files or settings cannot be used."""
EXIT_PREEMPTED = 3
"""Exit code of a run that saved and exited before its end, at a signal or a time limit."""
EXIT_INTERRUPTED = 130
"""Exit code at Ctrl-C, as shells have it."""


class ChatflowError(Exception):
    """What the user gave cannot be used. The message names the key, the value and what to do."""

    exit_code = EXIT_USAGE


class ConfigError(ChatflowError):
    """A setting, a flag or a configuration file cannot be used."""


class ConfigErrors(ConfigError):
    """Several settings, flags or keys that cannot be used, with one message each."""

    def __init__(self, messages: Iterable[str]) -> None:
        """Keep the messages."""
        self.messages = tuple(messages)
        super().__init__(self.messages)

    def __str__(self) -> str:
        """Return the messages, one per line."""
        return "\n".join(self.messages)


class DataError(ChatflowError):
    """A corpus, or a text to make one of, cannot be used."""


class SampleError(DataError):
    """A sample that a run has begun to read cannot be trained on."""

    exit_code = EXIT_FAILED


class RunError(ChatflowError):
    """Work that has begun cannot continue: the disk is full, or the lease of the folder is lost."""

    exit_code = EXIT_FAILED


class CheckpointError(ChatflowError):
    """A checkpoint or a run directory cannot be used."""


class TokenizerError(ChatflowError):
    """A tokenizer's files cannot be used."""


def is_shared(error: BaseException) -> bool:
    """Return whether every rank of a job raises this error, so that no rank has to report it."""
    return isinstance(error, ChatflowError) and not isinstance(error, SampleError)


def messages_of(error: ChatflowError) -> tuple[str, ...]:
    """Return the messages of an error, each one line."""
    return error.messages if isinstance(error, ConfigErrors) else (str(error),)


class ErrorCollector:
    """Collects independent errors, so that all of them are reported together."""

    def __init__(self) -> None:
        """Start without messages."""
        self.messages: list[str] = []

    def add(self, *messages: str) -> None:
        """Add messages, each once."""
        self.messages += [m for m in dict.fromkeys(messages) if m not in self.messages]

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Inside, a ChatflowError ends the block and is kept for `raise_all`."""
        try:
            yield
        except ChatflowError as error:
            self.add(*messages_of(error))

    def raise_all(self) -> None:
        """Raise ConfigErrors if anything was collected."""
        if self.messages:
            raise ConfigErrors(self.messages)
