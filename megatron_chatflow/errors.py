"""Errors that a user can fix: one message, no traceback. Everything else is a bug and keeps its
traceback.
"""


class ChatflowError(ValueError):
    """What the user gave cannot be used. The message names the key, the value and what to do."""


class ConfigError(ChatflowError):
    """A setting, a flag or a configuration file cannot be used."""


class DataError(ChatflowError):
    """A corpus, or a text to make one of, cannot be used."""


class SampleError(DataError):
    """A sample that a run has begun to read cannot be trained on."""


class CheckpointError(ChatflowError):
    """A checkpoint or a run directory cannot be used."""


class TokenizerError(ChatflowError):
    """A tokenizer's files cannot be used."""
