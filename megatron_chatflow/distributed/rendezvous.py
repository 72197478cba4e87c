"""How the processes of a job find each other, within a deadline and with names for what failed.

Rank 0 listens at the master's port and greets who connects; the others give rank, host and process
number. Then rank 0 sends all of them the same: where the store of the process groups is, or why
there is no job. torch's store is not used for this: its client takes any program at the port for a
store, waits for it without a deadline, and lets no other thread run meanwhile. No torch here.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from megatron_chatflow.distributed.launch import Launch, LaunchError, node_name
from megatron_chatflow.distributed.sockets import Lines, connect, line, parse, reason_of, resolve

_LINE = 4096
"""Bytes of a greeting or of what a process says about itself."""
_GRACE = 2.0
"""Seconds that the others wait for rank 0's answer after its deadline, which is theirs."""
_OTHER = "set another MASTER_PORT on all processes"
_count = 0
"""Meetings of this process so far: a second command of a process meets again at the same port."""
_listener: socket.socket | None = None


@dataclass(frozen=True)
class Process:
    """A process of the job."""

    rank: int
    world_size: int
    host: str
    pid: int
    gpu: str | None
    """The identity of its GPU, where no other process may use the same."""

    def __str__(self) -> str:
        """Return what messages call the process."""
        return f"rank {self.rank} on {self.host}, process {self.pid}"


@dataclass(frozen=True)
class Rendezvous:
    """All processes have come."""

    host: str
    """Where rank 0 is, as this process reaches it."""
    port: int
    """The port of the store of rank 0."""
    names: list[str]
    """What messages call each rank: ``rank 1 on n1, process 123``."""


def rendezvous(
    launch: Launch,
    seconds: float,
    make_store: Callable[[], int],
    gpu: str | None = None,
    agent_port: Callable[[int | None, float], int] | None = None,
) -> Rendezvous:
    """Wait until every process of the job has come. Called by every one.

    Args:
        launch: of several processes.
        seconds: from now on; the first process whose time is over ends the meeting for all.
        make_store: called on rank 0, opens the store and returns its port.
        gpu: see `Process`.
        agent_port: where the master's port is that of an agent, exchanges the port of the meeting:
            rank 0 gives its own and gets the one in effect, the others give None, both with the
            seconds that are left.

    Raises:
        LaunchError: on every process, with who came and who did not, or what else is wrong.
    """
    global _count
    close()
    _count += 1
    end = time.monotonic() + seconds
    me = Process(launch.rank, launch.world_size, node_name(), os.getpid(), gpu)
    port = launch.master_port or 0
    listener = None
    if me.rank == 0:
        listener = _listen(0 if agent_port else port)
    if agent_port:
        own = listener.getsockname()[1] if listener else None
        port = agent_port(own, end - time.monotonic())
        if listener and port != own:
            listener.close()
            listener = None
    if listener is None:
        taken = me.rank == 0 and not agent_port
        return _visit(me, "localhost" if taken else launch.master_addr or "", port, end, taken)
    try:
        meeting = _Host(listener, me, end, launch).gather(make_store)
    except BaseException:
        listener.close()
        raise
    _answer_later(listener, me)
    return meeting


def close() -> None:
    """Stop to answer processes that come after the meeting; a second call does nothing."""
    global _listener
    if _listener is not None:
        with suppress(OSError):
            _listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for a connection
        _listener.close()
        _listener = None


def _listen(port: int) -> socket.socket | None:
    """A socket at this port of all addresses; None where another process has the port."""
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            backlog=1024,
            dualstack_ipv6=dual,
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        raise LaunchError(
            f"MASTER_PORT {port}: this process cannot listen at it ({error.strerror}); set another"
        ) from None


def _answer_later(listener: socket.socket, me: Process) -> None:
    """Report to processes that come too late who has the port, in a daemon thread."""
    global _listener
    _listener = listener
    text = line({"greeting": str(me), "meeting": _count, "over": True})

    def answer() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.settimeout(1)
                connection.sendall(text)
                connection.recv(_LINE)  # or closing would be a reset, which takes the text back

    listener.setblocking(True)
    threading.Thread(target=answer, name="meeting", daemon=True).start()


def require_agent(launch: Launch, seconds: float) -> None:
    """Wait until the agent of torchrun listens at the master's port.

    Raises LaunchError where it does not.
    """
    reason, end = "not tried", time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            port = launch.master_port or 0
            connect(resolve(launch.master_addr or "", port, end), left).close()
            return
        except OSError as error:
            reason = reason_of(error)
        time.sleep(max(0.0, min(0.5, end - time.monotonic())))
    raise LaunchError(
        f"rank {launch.rank} on {node_name()} does not reach torchrun's agent within {seconds:.0f} "
        f"s at {launch.master_addr}, port {launch.master_port} ({reason}); start torchrun on "
        "that node, or raise --init-timeout",
        exit_code=1,
    )


class _Host:
    """Rank 0's side of the meeting."""

    def __init__(self, listener: socket.socket, me: Process, end: float, launch: Launch) -> None:
        self._listener, self._me, self._launch = listener, me, launch
        self._begin, self._end = time.monotonic(), end
        self._came: dict[int, Process] = {0: me}
        self._of: dict[socket.socket, Process] = {}
        self._greeting = line({"greeting": str(me), "meeting": _count, "over": False})

    def gather(self, make_store: Callable[[], int]) -> Rendezvous:
        self._listener.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            try:
                while len(self._came) < self._me.world_size:
                    self._wait(selector)
                port = make_store()
                names = [str(self._came[rank]) for rank in range(self._me.world_size)]
                self._tell({"port": port, "names": names})
                return Rendezvous("localhost", port, names)
            except LaunchError as error:
                self._tell({"error": str(error), "exit_code": error.exit_code})
                raise
            finally:
                for key in list(selector.get_map().values()):
                    if key.fileobj is not self._listener:
                        key.fileobj.close()  # type: ignore[union-attr]

    def _wait(self, selector: selectors.BaseSelector) -> None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise LaunchError(self._who_is_missing(), exit_code=1)
        for key, _ in selector.select(min(left, 1)):
            connection: Any = key.fileobj
            try:
                if connection is self._listener:
                    new, _ = self._listener.accept()
                    new.setblocking(False)
                    new.send(self._greeting)
                    selector.register(new, selectors.EVENT_READ, bytearray())
                    continue
                data = connection.recv(_LINE)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
                if connection is self._listener:
                    continue
            key.data.extend(data)
            if not data or len(key.data) > _LINE:
                selector.unregister(connection)
                connection.close()
                if connection in self._of:
                    raise LaunchError(
                        f"{self._of[connection]} came and exited before all processes had come; "
                        "see what it printed",
                        exit_code=1,
                    )
            elif b"\n" in key.data and connection not in self._of:
                self._arrive(connection, bytes(key.data))

    def _arrive(self, connection: socket.socket, text: bytes) -> None:
        said = parse(text)
        try:
            left = float(said.pop("left"))
            process = Process(**said)
            ours = 0 <= process.rank < process.world_size
        except (KeyError, TypeError, ValueError):
            ours = False
        if not ours:
            return  # another program; it is not answered
        self._of[connection] = process
        others = list(self._came.values())
        if process.world_size != self._me.world_size:
            raise LaunchError(
                f"WORLD_SIZE is {self._me.world_size} in {self._me} and {process.world_size} in "
                f"{process}; start all processes of a job with the same"
            )
        if process.rank in self._came:
            raise LaunchError(
                f"two processes have RANK {process.rank}: {self._came[process.rank]}, and "
                f"{process}; give each process of a job its own, and each job another MASTER_PORT"
            )
        for other in others:
            if process.gpu is not None and other.gpu == process.gpu:
                raise LaunchError(
                    f"{other}, and {process} use the same GPU ({process.gpu}); give each process "
                    "of a node its own LOCAL_RANK, from 0 up"
                )
        self._came[process.rank] = process
        self._end = min(self._end, time.monotonic() + left)

    def _tell(self, what: Mapping[str, Any]) -> None:
        text = line(what)
        for connection in self._of:
            with suppress(OSError):
                connection.settimeout(5)
                connection.sendall(text)

    def _who_is_missing(self) -> str:
        size = self._me.world_size
        here = list(self._came)
        absent, first = [], 0
        for rank in [*sorted(here), size]:
            if rank > first:
                absent.append(str(first) if rank == first + 1 else f"{first} to {rank - 1}")
            first = rank + 1
        missing = size - len(here)
        message = (
            f"{len(here)} of {size} processes came within "
            f"{time.monotonic() - self._begin:.0f} s: {_some(map(str, self._came.values()))}; "
            f"rank{'s' * (missing > 1)} {_some(absent, ', ')} did not; "
            "start all of them, see what they printed, or raise --init-timeout"
        )
        return message + ("" if self._launch.has_agent else self._address_note())

    def _address_note(self) -> str:
        """Whether the others can find this host by MASTER_ADDR."""
        address = self._launch.master_addr
        try:
            found = resolve(address or "", 1, time.monotonic() + 1)
        except OSError as error:
            return f". MASTER_ADDR {address} is not known on this host ({reason_of(error)})"
        for family, _, _, _, where in found:
            with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind((where[0], 0, *where[2:]))
                return ""
        return f". MASTER_ADDR {address} is {found[0][4][0]}, which is not an address of this host"


def _visit(me: Process, address: str, port: int, end: float, taken: bool) -> Rendezvous:
    """The other ranks' side of the meeting, and that of a rank 0 whose port is `taken`."""
    begin, reason = time.monotonic(), "not tried"
    where = f"MASTER_PORT {port}" if taken else f"MASTER_ADDR {address}, MASTER_PORT {port}"
    while (left := end - time.monotonic()) > 0:
        try:
            connection = connect(resolve(address, port, end), min(left, 5))
        except socket.gaierror as error:
            reason = f"{address} is not known on this host ({reason_of(error)})"
            time.sleep(max(0.0, min(1.0, end - time.monotonic())))
        except OSError as error:
            reason = f"nobody listens there ({reason_of(error)})"
        else:
            with connection:
                meeting = _listen_to_host(connection, me, where, end)
            if meeting is not None:
                return meeting
            reason = "the port is in use by another program, or rank 0 is just ending"
        if taken:
            raise LaunchError(f"{me}: {where} is in use by another program; {_OTHER}")
        time.sleep(max(0.0, min(0.2, end - time.monotonic())))
    raise LaunchError(
        f"{me} did not find rank 0 within {time.monotonic() - begin:.0f} s at {where}: {reason}; "
        "start rank 0 on that host, set MASTER_ADDR and MASTER_PORT, or raise --init-timeout",
        exit_code=1,
    )


def _listen_to_host(
    connection: socket.socket, me: Process, where: str, end: float
) -> Rendezvous | None:
    """Return what rank 0 answers.

    None where it is still, or was just now, in an earlier rendezvous of its process, or where
    another program ends the connection.
    """
    said = dataclasses.asdict(me) | {"left": end - time.monotonic()}
    held, lines = f"{me}: {where} is in use by another program", Lines(connection)
    try:
        connection.settimeout(5)
        connection.sendall(line(said))
        text = lines.read(end, _LINE)
    except TimeoutError:
        raise LaunchError(
            f"{held}, or by a rank 0 that is stopped: it does not answer; {_OTHER}"
        ) from None
    except OSError:
        text = b""
    if not text:
        return None
    greeting = parse(text)
    if "greeting" not in greeting:
        raise LaunchError(f"{held}; {_OTHER}")
    if greeting.get("over"):
        if greeting.get("meeting", 0) < _count:
            return None
        raise LaunchError(
            f"{me}: {where} is in use by another run, or the job is complete without this process: "
            f"{greeting['greeting']} holds it; {_OTHER}, or give each process its own RANK"
        )
    host = greeting["greeting"]
    try:
        verdict = parse(lines.read(end + _GRACE, 1 << 26))
    except TimeoutError:
        raise LaunchError(f"{host} does not answer {me}; is it stopped?", exit_code=1) from None
    except OSError:
        verdict = {}
    if "error" in verdict:
        raise LaunchError(verdict["error"], exit_code=verdict["exit_code"], shared=True)
    if "port" not in verdict:
        raise LaunchError(
            f"{host} exited before all processes had come; see what it printed", exit_code=1
        )
    return Rendezvous(connection.getpeername()[0], verdict["port"], verdict["names"])


def _some(names: Iterable[str], separator: str = "; ", most: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more
