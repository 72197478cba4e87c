"""The state of other processes."""

from pathlib import Path


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal (Linux); one in a debugger does not count."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] == "T"
