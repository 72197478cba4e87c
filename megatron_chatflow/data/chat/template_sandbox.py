"""Chat templates run in a separate process, with limits of time, memory and output.

A template is text from elsewhere. The process gets one request per line and answers each with a
line of JSON. It has Jinja's sandbox as `transformers` has it, a limit of CPU time for each
rendering (SIGXCPU ends it, whatever it is doing), a limit of memory, and can neither write files
nor start processes. So it does not matter which operator or filter asks for too much. This file is
both sides; the process reads it alone, and imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import Any, NoReturn

from megatron_chatflow.errors import DataError

SECONDS = 5
"""CPU time of one rendering."""
MEMORY = 512 << 20
"""Bytes of memory that the process may map, in addition to 32 times the request."""
OUTPUT = 16 << 20
"""Characters that a rendering may have, in addition to 32 times the request."""
TEMPLATE = 1 << 20
"""Characters that a template may have."""
STOPPED_SECONDS = 30
"""How long the process may be stopped (SIGSTOP), when it uses no CPU time and never answers."""
_NO_DATE = "'strftime_now' is undefined"
_ASKS_FOR_DATE = (
    "it asks for the date (strftime_now), on which a corpus must not depend; write a date into it"
)
_START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "runpy.run_path(sys.argv[2], run_name='__main__')"
)


class TemplateRefusal(Exception):
    """The template cannot write this conversation; the message says why."""

    def __init__(self, reason: str, *, always: bool) -> None:
        super().__init__(reason)
        self.always = always
        """Whether it is an error of the template, not its verdict about the conversation."""


class TemplateLimit(DataError):
    """The template cannot be read, or exceeds a limit, for any conversation."""


class TemplateSandbox:
    """A template in its process. One rendering at a time; threads wait for each other.

    Args:
        template: Jinja text.

    Attributes:
        marks: whether the template marks answers with `{% generation %}`.

    Raises:
        TemplateLimit: the template is not Jinja, or too long.
        TemplateRefusal: a constant in it cannot be computed.
    """

    def __init__(self, template: str) -> None:
        self._lock = threading.Lock()
        self._broken = ""
        self._stopped = False
        if len(template) > TEMPLATE:
            raise TemplateLimit(f"has {len(template):,} characters, more than {TEMPLATE:,}")
        command = [sys.executable, "-c", _START, json.dumps(sys.path), __file__]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet
        )
        assert self._process.stdin and self._process.stdout, "both are pipes"
        self._requests, self._replies = self._process.stdin, self._process.stdout
        threading.Thread(target=_watch, args=[weakref.ref(self)], daemon=True).start()
        limits = {"seconds": SECONDS, "memory": MEMORY, "output": OUTPUT}
        try:
            self.marks = bool(self._ask({"template": template, **limits})["marks"])
        except TemplateRefusal:
            self.close()
            raise

    def render(
        self, values: dict[str, Any], steps: list[tuple[int, bool]]
    ) -> list[tuple[str, list[tuple[int, int]]]]:
        """Render the first messages of a conversation, for each of `steps`.

        Args:
            values: what the template is given; `messages` among it.
            steps: how many messages, and whether the prompt for an answer is added.

        Returns:
            text, and where the parts marked with `{% generation %}` begin and end, for each step.

        Raises:
            TemplateRefusal: the template raises an error.
            TemplateLimit: it exceeds a limit.
        """
        with self._lock:
            reply = self._ask({"values": values, "steps": steps})
        return [(text, [(begin, end) for begin, end in spans]) for text, spans in reply["rendered"]]

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._requests.close()
        self._process.kill()
        self._process.wait()
        self._replies.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if not self._broken:
            try:
                self._requests.write(json.dumps(request).encode() + b"\n")
                self._requests.flush()
                line = self._replies.readline()
            except BrokenPipeError:
                line = b""
            reply: dict[str, Any] = (
                json.loads(line) if line.endswith(b"\n") else {"limit": self._ending()}
            )
            if "refused" in reply:
                raise TemplateRefusal(reply["refused"], always=reply["always"])
            if "limit" not in reply:
                return reply
            self._broken = reply["limit"]
            self.close()
        raise TemplateLimit(self._broken)

    def _ending(self) -> str:
        code = self._process.wait()
        if self._stopped:
            return f"gives no answer: its process was stopped (SIGSTOP) for {STOPPED_SECONDS} s"
        if code == -signal.SIGXCPU:
            return f"runs for more than {SECONDS} s"
        return f"ends the process that renders it (code {code})"


def _watch(reference: weakref.ref[TemplateSandbox]) -> None:
    """End the process of a sandbox when it is stopped, so that its caller continues."""
    from megatron_chatflow.utils.process import is_stopped

    seconds = 0
    while (opened := reference()) is not None and opened._process.poll() is None:
        seconds = seconds + 1 if is_stopped(opened._process.pid) else 0
        if seconds > STOPPED_SECONDS:
            opened._stopped = True
            opened._process.kill()
        del opened
        time.sleep(1)


class _TooMuch(Exception):
    pass


def _serve() -> None:
    """Run as the process: read a template, then answer requests."""
    # They reach the entire process group; the end of the input ends this process.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    for name in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        resource.setrlimit(name, (0, 0))
    start = json.loads(sys.stdin.buffer.readline())
    # What encloses a marked part in the rendering, and no text can know.
    opening, closing = (f"\ue000{os.urandom(16).hex()}{end}" for end in "<>")
    found = []

    class Generation(jinja2.ext.Extension):
        """`{% generation %} ... {% endgeneration %}`: the answer, for transformers' masks."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            found.append(line)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return opening + caller() + closing

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """The filter as transformers has it."""
        form = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, **form)

    extensions = [Generation, jinja2.ext.loopcontrols]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    # A corpus must not depend on chance.
    del environment.filters["random"], environment.globals["lipsum"]
    marks = re.compile(f"{opening}|{closing}")

    def limited(work: Any, size: int) -> dict[str, Any]:
        resource.setrlimit(
            resource.RLIMIT_AS,
            (start["memory"] + 32 * size, resource.getrlimit(resource.RLIMIT_AS)[1]),
        )
        try:
            return work()
        except jinja2.TemplateSyntaxError as error:
            return {"limit": f"is not Jinja ({error})"}
        except MemoryError:
            return {"limit": f"asks for more than {start['memory'] >> 20} MB of memory"}
        except RecursionError:
            return {"limit": "is nested or calls itself too deeply"}
        except _TooMuch:
            return {"limit": f"writes more than {start['output'] + 32 * size:,} characters"}
        except (jinja2.exceptions.SecurityError, jinja2.TemplateError) as error:
            if str(error) == _NO_DATE:
                return {"refused": _ASKS_FOR_DATE, "always": True}
            return {
                "refused": str(error) or type(error).__name__,
                "always": isinstance(error, jinja2.exceptions.SecurityError),
            }
        except Exception as error:  # anything that Python raises in it is the template's
            return {"refused": f"{type(error).__name__}: {error}"[:500], "always": True}

    def timed() -> None:
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(
            resource.RLIMIT_CPU, (math.ceil(time.process_time()) + start["seconds"], hard)
        )

    def compiled() -> dict[str, Any]:
        nonlocal template
        timed()
        template = environment.from_string(start["template"])
        return {"marks": bool(found)}

    def rendered(request: dict[str, Any], size: int) -> dict[str, Any]:
        result = []
        values = request["values"]
        for count, ask in request["steps"]:
            timed()
            pieces, length = [], 0
            for piece in template.generate(
                {**values, "messages": values["messages"][:count], "add_generation_prompt": ask}
            ):
                length += len(piece)
                if length > start["output"] + 32 * size:
                    raise _TooMuch
                pieces.append(piece)
            text = "".join(pieces)
            try:
                text.encode()
            except UnicodeEncodeError as error:
                return {
                    "refused": f"writes a lone surrogate at character {error.start}",
                    "always": True,
                }
            result.append(unmarked(text))
        return {"rendered": result}

    def unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
        spans, pieces, at, depth, begin, length = [], [], 0, 0, 0, 0
        for mark in marks.finditer(text):
            pieces.append(text[at : mark.start()])
            length += mark.start() - at
            at = mark.end()
            depth += 1 if mark[0] == opening else -1
            if mark[0] == opening and depth == 1:
                begin = length
            elif mark[0] == closing and depth == 0:
                spans.append((begin, length))
        return "".join([*pieces, text[at:]]), spans

    template: Any = None
    reply = limited(compiled, len(start["template"]))
    while True:
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        reply = limited(lambda line=line: rendered(json.loads(line), len(line)), len(line))


if __name__ == "__main__":
    _serve()
