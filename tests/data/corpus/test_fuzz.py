"""Indexes, manifests, curricula and plans with other values: one message, or a valid result.

`test_faults.py` cuts files and changes bytes; here values are replaced by others that their place
can hold. No case may take 1 GB of memory or 20 s.
"""

import copy
import json
import os
import resource
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_chatflow.curriculum import BlendPlan, load_curriculum, parse_curriculum
from megatron_chatflow.data import IndexedDataset, read_manifest
from megatron_chatflow.data.corpus.index_header import HEADER
from megatron_chatflow.errors import ChatflowError
from tests.data.corpus.test_damaged_files import (
    SUFFIXES,
    faults,
    outcome,
    read_all,
    read_documents,
    write,
)

MEMORY = 1 << 30
SECONDS = 20
EXAMPLES = [40, pytest.param(1500, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def limited_memory():
    """Let a huge allocation fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check(examples: int, test, **strategies) -> None:
    """Run a test with values of the strategies."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    budget = settings(
        max_examples=examples, database=None, deadline=SECONDS * 1000, suppress_health_check=quiet
    )
    budget(given(**strategies)(test))()


def refused(call, *arguments):
    """Return what a call returns, or None after a ChatflowError of one line."""
    try:
        return call(*arguments)
    except ChatflowError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 2000, error
        return None


NUMBERS = st.sampled_from(
    [0, 1, 2, -1, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**53 + 1]
    + [2**62, 2**63 - 1, 2**63, 2**64, 10**40]
)
FLOATS = st.sampled_from([0.5, -0.0, 1e-320, 1e300, 1e308, float("inf"), float("nan")])
TEXTS = st.sampled_from(
    ["", " ", "a", "en", "zh", "step", "linear", "root2", "root1e9", "root0", "repeat", "../x"]
    + ["40%", "-1%", "1e999%", "nan%", "\n", "\0", "\x1b[0m"]
)
LEAVES = st.none() | st.booleans() | NUMBERS | FLOATS | TEXTS | st.integers() | st.floats()
JUNK = st.recursive(
    LEAVES | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def places(tree, path=()):
    """Every place in a tree of mappings and lists."""
    yield path
    for key, value in (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    ):
        yield from places(value, (*path, key))


@st.composite
def changed(draw, tree):
    """A tree with up to three places changed, missing, doubled or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(tree))))
        if not path:
            if draw(st.integers(0, 20)) == 0:
                return draw(JUNK)
            continue
        *above, key = path
        node = tree
        for step in above:
            node = node[step]
        what = draw(
            st.sampled_from(["replaced", "replaced", "replaced", "missing", "twice", "renamed"])
        )
        if what == "replaced":
            node[key] = draw(JUNK)
        elif what == "missing":
            del node[key]
        elif isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        else:
            node[draw(TEXTS)] = node[key] if what == "twice" else node.pop(key)
    return tree


@pytest.fixture(scope="module", params=["text", "instruct"])
def corpus(request, tmp_path_factory):
    """Folder, kind and files of a corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    return folder, request.param, write(folder, request.param)


def restore(folder, content, **others):
    for path in folder.iterdir():
        path.unlink()
    for suffix in SUFFIXES:
        (folder / f"a{suffix}").write_bytes(others.get(suffix[1:], content[suffix]))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_an_index_with_other_numbers_is_refused_or_read_as_it_says(corpus, examples):
    folder, kind, content = corpus
    original = content[".idx"]
    _, _, _, sequences, documents = HEADER.unpack(original[: HEADER.size])
    fields = [(17, "<B"), (9, "<Q"), (18, "<Q"), (26, "<Q")]
    fields += [(HEADER.size + 4 * i, "<i") for i in range(sequences)]
    fields += [(HEADER.size + 4 * sequences + 8 * i, "<q") for i in range(sequences + documents)]
    fields += [(len(original) - 1 - i, "<b") for i in range(sequences if kind == "instruct" else 0)]

    def test(changes):
        data = bytearray(original)
        for (at, form), value in changes:
            size = struct.calcsize(form)
            data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
        restore(folder, content, idx=bytes(data))
        for split in ("1", "80,15,5"):
            outcome(read_all, folder, kind, split)
        outcome(read_documents, folder, kind)
        found = outcome(faults, folder)
        if found is not None:
            outcome(lambda f: IndexedDataset(f / "a").fingerprint(), folder)
        if bytes(data) != original:
            assert found != []
        if found == []:
            assert IndexedDataset(folder / "a").num_tokens * 2 == len(content[".bin"])

    check(
        examples,
        test,
        changes=st.lists(st.tuples(st.sampled_from(fields), NUMBERS), min_size=1, max_size=3),
    )


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_manifest_with_other_values_is_refused_or_read(corpus, examples):
    folder, kind, content = corpus

    def test(tree):
        text = json.dumps(tree)
        restore(folder, content, json=text.encode())
        found = outcome(lambda f: read_manifest(f / "a"), folder)
        assert found is None or isinstance(found.tokenizer["vocab_size"], int)
        outcome(read_all, folder, kind)
        outcome(faults, folder)

    check(examples, test, tree=changed(json.loads(content[".json"])))


CURRICULUM = {
    "clock": "samples",
    "domains": {
        "en": {"path": "en", "max_epochs": 2},
        "zh": {"path": "zh", "valid": "held"},
        "chat": {"path": "chat", "kind": "instruct", "train_on_prompt": True},
    },
    "stages": [
        {"name": "a", "at": 0, "weights": {"en": 1, "zh": 0.5}},
        {"name": "b", "at": "40%", "weights": {"zh": 1}, "ramp": "root2"},
        {"name": "c", "at": 900, "weights": {"chat": 3, "en": 1}, "ramp": "geometric"},
    ],
    "on_exhausted": "redistribute",
    "validation": {"held": {"path": "other"}},
}
SIZES = st.sampled_from([1, 100, 1000, 10**9, 2**53, 2**53 + 1, 2**70, 0, -1])


def check_plan(plan: BlendPlan) -> None:
    """What holds for every plan."""
    total = plan.num_samples
    for n in sorted({0, 1, min(50, total), total // 2, total}):
        counts = plan.counts(n)
        assert sum(counts) == n and min(counts) >= 0
        assert abs(sum(plan.shares(n)) - 1) < 1e-9
    for start in {0, max(0, total // 2 - 20), max(0, total - 40)}:
        stop = min(start + 40, total)
        domains, ordinals = plan.locate(start, stop)
        assert len(domains) == len(ordinals) == stop - start
        assert all(0 <= domain < len(plan.domain_names) for domain in domains)
    again = BlendPlan.from_json(plan.to_json())
    assert again.fingerprint() == plan.fingerprint() and again.to_json() == plan.to_json()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_curriculum_with_other_values_is_refused_or_gives_a_plan_that_holds(tmp_path, examples):
    def test(tree, samples):
        (tmp_path / "c.yaml").write_text(json.dumps(tree))
        curriculum = refused(load_curriculum, tmp_path / "c.yaml")
        if curriculum is None:
            return
        plan = refused(
            lambda: BlendPlan(curriculum, num_samples=samples, global_batch_size=4, seq_length=8)
        )
        if plan is not None:
            check_plan(plan)

    check(examples, test, tree=changed(CURRICULUM), samples=SIZES)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_curriculum_with_other_bytes_is_refused_or_gives_a_plan_that_holds(tmp_path, examples):
    text = json.dumps(CURRICULUM, indent=1).encode()

    def test(at, content):
        at %= len(text)
        (tmp_path / "c.yaml").write_bytes(text[:at] + content + text[at + len(content) :])
        curriculum = refused(load_curriculum, tmp_path / "c.yaml")
        if curriculum is not None:
            plan = refused(
                lambda: BlendPlan(curriculum, num_samples=1000, global_batch_size=4, seq_length=8)
            )
            if plan is not None:
                check_plan(plan)

    marks = [b"&a ", b"*a", b"<<: ", b"? ", b"!!int ", b"- ", b"|\n", b"%", b"#", b"---\n", b"{"]
    pieces = st.binary(max_size=6) | st.sampled_from([*marks, b"}", b"]", b'"'])
    check(examples, test, at=st.integers(0, 10**6), content=pieces)


def _plan() -> BlendPlan:
    curriculum = parse_curriculum(CURRICULUM, source="test", folder=os.sep)
    other = copy.deepcopy(CURRICULUM)
    other["stages"][2]["weights"] = {"chat": 1}
    plan = BlendPlan(
        curriculum,
        num_samples=1000,
        global_batch_size=4,
        seq_length=8,
        capacities={"en": 900, "zh": 5000, "chat": 40},
    )
    return plan.amend(
        at=500,
        curriculum=parse_curriculum(other, source="test", folder=os.sep),
        capacities={"en": 950, "zh": 5000, "chat": 5000},
    )


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_plan_with_other_values_is_refused_or_holds(examples):
    text = _plan().to_json()
    check_plan(BlendPlan.from_json(text))

    def test(tree, at, content):
        found = [refused(BlendPlan.from_json, json.dumps(tree))]
        damaged = text.encode()
        at %= len(damaged)
        damaged = damaged[:at] + content + damaged[at + len(content) :]
        found.append(refused(BlendPlan.from_json, damaged.decode(errors="surrogateescape")))
        for plan in filter(None, found):
            check_plan(plan)

    check(
        examples,
        test,
        tree=changed(json.loads(text)),
        at=st.integers(0, 10**6),
        content=st.binary(max_size=4),
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["num_samples"], 2**60),
        (["domains", "en", "path"], None),
        (["domains", "en", "kind"], "x"),
        (["domains", "en", "max_epochs"], "2"),
        (["domains", "zh", "valid"], 1),
        (["segments", 0, "capacities", "en"], "5"),
        (["segments", 0, "capacities", "en"], -1),
        (["segments", 0, "capacities", "x"], 1),
        (["segments", 0, "stages", 0, "name"], None),
        (["segments", 0, "stages", 0, "weights", "en"], True),
    ],
)
def test_a_plan_with_a_value_that_no_plan_has_is_refused(path, value):
    ledger = json.loads(_plan().to_json())
    *above, key = path
    node = ledger
    for step in above:
        node = node[step]
    node[key] = value
    assert refused(BlendPlan.from_json, json.dumps(ledger)) is None
