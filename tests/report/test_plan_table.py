"""The table of `plan`."""

from types import SimpleNamespace

from megatron_chatflow.report.plan_table import plan_table


def stage(**values):
    row = {
        "stage": "one",
        "start": 0,
        "stop": 60_000,
        "share": 0.5,
        "share_start": 0.75,
        "share_end": 0.25,
        "samples": 30_000,
        "epochs": 1.5,
    }
    row |= values
    return SimpleNamespace(**row, tokens=row["samples"] * 2048)


def domain(name, samples, epochs, max_epochs=None, exhausted_at=None):
    return SimpleNamespace(
        name=name,
        samples=samples,
        tokens=samples * 2048,
        epochs=epochs,
        max_epochs=max_epochs,
        exhausted_at=exhausted_at,
    )


STAGES = [
    stage(domain="en"),
    stage(domain="中文", share=0.5 - 1e-6),
    stage(domain="rare", share=1e-6, share_start=0.0, share_end=2e-6, samples=0, epochs=0.0),
    stage(domain="gone", share=0.0, samples=0),
    stage(
        stage="two",
        start=60_000,
        stop=100_000,
        domain="en",
        share=1.0,
        share_start=1.0,
        share_end=1.0,
        samples=40_000,
        epochs=0.001,
    ),
]
DOMAINS = [
    domain("en", 70_000, 3.501),
    domain("中文", 30_000, 1.5, 4, 88_000),
    domain("rare", 0, 0.0),
    domain("gone", 0, 0.0),
]


def table(**changes):
    values = {
        "num_samples": 100_000,
        "seq_length": 2048,
        "end": 100_000,
        "warnings": ["rare gets no sample"],
        **changes,
    }
    return plan_table(STAGES, DOMAINS, **values)


def test_each_stage_lists_the_domains_that_have_a_share_in_it():
    blocks = table().split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [
        "stage one: samples 0 to 59,999",
        "stage two: samples 60,000 to 99,999",
        "the complete run: 100,000 samples of 2,048 tokens, 205M tokens",
        "warning: rare gets no sample",
    ]
    listed = [[line.split()[0] for line in block.splitlines()[2:]] for block in blocks[:3]]
    assert listed == [["en", "中文", "rare"], ["en"], ["en", "中文", "rare", "gone"]]


def test_a_row_says_share_samples_tokens_and_epochs():
    lines = [line.split() for line in table().splitlines()]
    assert ["en", "50.0%", "75.0%", "25.0%", "30,000", "61.4M", "1.50"] in lines
    assert ["rare", "0.0001%", "0.0%", "0.0002%", "0", "0", "0.00"] in lines
    assert ["en", "100.0%", "100.0%", "100.0%", "40,000", "81.9M", "0.001"] in lines
    assert ["中文", "30.0%", "30,000", "61.4M", "1.50", "4", "88,000"] in lines
    assert ["en", "70.0%", "70,000", "143M", "3.50", "-", "-"] in lines


def test_columns_end_at_the_same_place_whatever_the_script():
    def width(text):
        return len(text.encode("gbk"))

    rows = table().split("\n\n")[0].splitlines()[1:]
    assert len({width(row) for row in rows}) == 1


def test_a_run_that_ends_early_says_so():
    assert "the complete run: 90,000 of 100,000 samples of 2,048 tokens, 184M tokens" in table(
        end=90_000
    )
