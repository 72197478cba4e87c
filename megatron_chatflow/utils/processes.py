"""The state of other processes."""

from pathlib import Path


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal (SIGSTOP), on Linux; a debugger's does not count."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] == "T"
