"""Errors that users can fix: one message, no traceback."""


class DataError(ValueError):
    """What a run reads in a corpus cannot be used."""
