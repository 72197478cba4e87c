"""What several commands share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron_chatflow.errors import ChatflowError, ConfigErrors, messages_of


@contextlib.contextmanager
def prefixed_errors(of: str) -> Iterator[None]:
    """Put `of` before each message of a ChatflowError that is raised inside."""
    try:
        yield
    except ChatflowError as error:
        raise ConfigErrors(f"{of}{message}" for message in messages_of(error)) from None
