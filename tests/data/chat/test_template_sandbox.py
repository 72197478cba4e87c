"""Hostile chat templates: each gives one message, in bounded time and memory, and the process that
renders them is gone afterwards.
"""

import signal
import time

import psutil
import pytest

from megatron_chatflow.data.chat import template_sandbox
from megatron_chatflow.data.chat.jinja_template import check_tokenizer_template
from megatron_chatflow.data.chat.template_sandbox import (
    TemplateLimit,
    TemplateRefusal,
    TemplateSandbox,
)
from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import load_tokenizer

MEMORY = "asks for more than 512 MB of memory"
TIME = "runs for more than 1 s"
DOUBLED = (
    "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor "
    "%}{{ n.s }}"
)
HOSTILE = {
    "{{ 'a' * 10**10 }}": MEMORY,
    "{{ [0] * 10**10 }}": MEMORY,
    "{{ 'a' | center(10**10) }}": MEMORY,
    "{{ 'a'.ljust(10**10) }}": MEMORY,
    "{{ '%10000000000d' % 1 }}": MEMORY,
    "{{ '{:>10000000000}'.format(1) }}": MEMORY,
    "{{ ('a' * 10**6) | replace('a', 'b' * 1000) }}": MEMORY,
    "{{ [1] | tojson(indent=10**10) }}": MEMORY,
    DOUBLED: MEMORY,
    "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}": "writes more than 16,7",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": TIME,
    "{{ 2 ** (10**9) }}": TIME,
    (
        "{{ range(99999) | map('string') | sum(start='') | length }}{% for i in range(99999) "
        "%}{{ range(99999) | sum }}{% endfor %}"
    ): "",
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself too deeply",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "",
    "{% if 1 %}" * 300 + "{% endif %}" * 300: "",
    "{{ 'a' }}" * 200_000: "has 1,800,000 characters, more than 1,048,576",
    "{% include '/etc/passwd' %}": "no loader",
    "{% import 'x' as y %}": "no loader",
    "{% extends 'x' %}": "no loader",
    "{{ 1 / 0 }}": "division by zero",
    "{{ 1 + 'a' }}": "TypeError",
    "{{ messages.__class__.__base__.__subclasses__() }}": "unsafe",
    "{{ raise_exception.__globals__['os'] }}": "unsafe",
    "{{ messages.append(1) }}": "",
    "{{ messages[0]['content'].x.y }}": "no attribute",
    "{{ '\\ud800' }}": "writes a lone surrogate at character 0",
    "{{ [1, 2] | random }}": "No filter named 'random'",
    "{{ lipsum() }}": "'lipsum' is undefined",
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}": "calls itself too deeply",
    "{% block x %}{{ self.x() }}{% endblock %}": "calls itself too deeply",
    "{{ [1] | slice(10**9) | list }}": "",
    "{{ [1, 2] | join('x' * 10**9) }}": MEMORY,
    "{{ (10**5000) }}": "Exceeds the limit",
    "{{ {[]: 1} }}": "unhashable",
    "{% for": "is not Jinja",
    "{% generation %}": "is not Jinja",
    "{{ raise_exception('no') }}": "no",
}


@pytest.fixture(autouse=True)
def one_second(monkeypatch):
    monkeypatch.setattr(template_sandbox, "SECONDS", 1)


@pytest.fixture(autouse=True)
def children_of_other_tests():
    """Remember the processes that other tests of this session keep, the pool's ranks among them."""
    _OTHERS[:] = psutil.Process().children()


_OTHERS: list[psutil.Process] = []


def _new_children() -> set[psutil.Process]:
    return set(psutil.Process().children()) - set(_OTHERS)


@pytest.mark.parametrize("template", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_template_gives_one_message_in_bounded_time_and_memory(template):
    before = psutil.Process().cpu_times()
    with pytest.raises((TemplateLimit, TemplateRefusal)) as error:
        opened = TemplateSandbox(template)
        try:
            opened.render({"messages": [{"role": "user", "content": "Hello"}]}, [(1, True)])
        finally:
            opened.close()
    assert HOSTILE[template] in str(error.value) and len(str(error.value)) < 1000
    assert "Traceback" not in str(error.value) and str(error.value).strip()
    spent = psutil.Process().cpu_times()
    assert spent.children_user - before.children_user < 5
    assert _new_children() == set()


def test_a_template_beyond_its_limits_is_not_tried_again_and_leaves_no_process():
    opened = TemplateSandbox("{% if messages[0].content == 'x' %}{{ 'a' * 10**10 }}{% endif %}fine")
    assert opened.render({"messages": [{"content": "y"}]}, [(1, False)]) == [("fine", [])]
    for content in "xy":
        with pytest.raises(TemplateLimit, match="asks for more than 512 MB"):
            opened.render({"messages": [{"content": content}]}, [(1, False)])
    assert _new_children() == set()


def test_a_stopped_process_gives_one_message(monkeypatch):
    monkeypatch.setattr(template_sandbox, "STOPPED_SECONDS", 1)
    opened = TemplateSandbox("{{ messages }}")
    opened._process.send_signal(signal.SIGSTOP)
    for content in ("x" * 1_000_000, "y"):  # more than a pipe holds
        with pytest.raises(
            TemplateLimit, match=r"gives no answer: its process was stopped \(SIGSTOP\) for 1 s"
        ):
            opened.render({"messages": [{"content": content}]}, [(1, False)])
    assert _new_children() == set()


def test_limits_grow_with_the_conversation():
    opened = TemplateSandbox("{% for m in messages %}{{ m.content }}{% endfor %}")
    text = "á" * 3_000_000
    assert opened.render({"messages": [{"content": text}] * 7}, [(7, False)]) == [(text * 7, [])]
    opened.close()


class _Bytes(type(load_tokenizer("ByteLevelTokenizer"))):
    chat_template = "{{ 'a' * 10**10 }}"


def test_the_check_before_a_run_tries_the_template():
    began = time.monotonic()
    with pytest.raises(
        ChatflowError, match=f"the chat template of .* {MEMORY}; fix it or name another template"
    ):
        check_tokenizer_template(_Bytes())
    failing = _Bytes()
    failing.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(ChatflowError, match="fails: ZeroDivisionError: division by zero; fix it"):
        check_tokenizer_template(failing)
    strict = _Bytes()
    strict.chat_template = "{{ raise_exception('begin with a system prompt') }}"
    check_tokenizer_template(strict)
    assert time.monotonic() - began < 60


def test_signals_to_the_group_leave_the_process_to_its_parent():
    opened = TemplateSandbox("fine")
    (process,) = _new_children()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    assert opened.render({"messages": []}, [(0, False)]) == [("fine", [])]
    opened.close()
    assert not process.is_running()
