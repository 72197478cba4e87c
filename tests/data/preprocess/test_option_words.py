"""Words of the command line that would leave the output's folder, or the line that they are printed
on.
"""

import pytest

from megatron_chatflow.data.preprocess.options import PreprocessOptions
from megatron_chatflow.data.preprocess.pipeline import preprocess
from megatron_chatflow.errors import ChatflowError


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"json_keys": ("a/b",)}, "--json-keys: 'a/b'"),
        ({"json_keys": ("text", "../x")}, "--json-keys: '../x'"),
        ({"json_keys": ("a\nb",)}, "--json-keys: 'a\\nb'"),
        ({"output_prefix": "out\n/x"}, "--output-prefix: "),
        ({"lang": "zh\x1b"}, "--lang: "),
        ({"input": ("in\n.jsonl",)}, "--input: "),
    ],
)
def test_such_a_word_is_refused_and_nothing_is_written(tmp_path, changes, flag):
    (tmp_path / "out\n").mkdir()
    (tmp_path / "in\n.jsonl").write_text('{"text": "1"}\n')
    (tmp_path / "in.jsonl").write_text('{"text": "1", "a/b": "2", "../x": "3", "a\\nb": "4"}\n')
    words = {"input": ("in.jsonl",), "output_prefix": "made/out"} | changes
    paths = {
        "input": tuple(str(tmp_path / path) for path in words.pop("input")),
        "output_prefix": str(tmp_path / words.pop("output_prefix")),
    }
    with pytest.raises(ChatflowError) as error:
        preprocess(
            PreprocessOptions(tokenizer_type="NullTokenizer", vocab_size=100, **paths, **words)
        )
    assert str(error.value).startswith(flag) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in\n.jsonl", "in.jsonl", "out\n"]
