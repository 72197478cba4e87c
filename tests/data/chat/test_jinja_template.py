"""The tokenizer's own chat template, against Hugging Face's transformers where it is installed, and
against ChatML written out.
"""

import json

import pytest
import tokenizers

from megatron_chatflow.data.chat.conversations import parse_conversation
from megatron_chatflow.data.chat.jinja_template import check_tokenizer_template
from megatron_chatflow.data.chat.prompts import chat_prompt
from megatron_chatflow.data.chat.templates import (
    ANSWER,
    CHAT_TEMPLATES,
    PROMPT,
    MalformedRecord,
    mark_untrained,
)
from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import load_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}\n{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
    "message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- "
    "'<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
SPECIAL = "<|im_start|> <|im_end|> <|begin|> <|start_header_id|> <|end_header_id|> <|eot_id|>"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "再说一遍。"},
    {"role": "assistant", "content": "四。\n\nDone."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level tokenizer.json with the control tokens of several models."""
    path = tmp_path_factory.mktemp("tokenizer")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL.split(),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        [message["content"] for message in CHAT] * 3 + ["assistant user system"] * 5, trainer
    )
    backend.save(str(path / "tokenizer.json"))
    return path


def load(folder, template, **more):
    config = {
        "eos_token": "<|im_end|>",
        "bos_token": "<|begin|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    } | more
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer("HuggingFaceTokenizer", tokenizer_model=folder)


def encoded(passages, tokenizer):
    return [
        (
            p.mode,
            [
                i
                for part in p.parts
                for i in ([part] if isinstance(part, int) else tokenizer.encode(part))
            ],
        )
        for p in passages
    ]


def own(tokenizer, messages):
    return CHAT_TEMPLATES["tokenizer"](parse_conversation({"messages": messages}), tokenizer)


def test_chatml_as_a_template_of_the_tokenizer_says_what_the_built_in_one_says(folder):
    tokenizer = load(folder, CHATML)
    ours = [i for _, ids in encoded(own(tokenizer, CHAT), tokenizer) for i in ids]
    built_in = [
        i
        for _, ids in encoded(
            CHAT_TEMPLATES["chatml"](parse_conversation({"messages": CHAT}), tokenizer), tokenizer
        )
        for i in ids
    ]
    assert ours == built_in + tokenizer.encode("\n")


@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama3"])
def test_prompts_end_where_the_model_is_to_answer(folder, template):
    tokenizer = load(folder, template)
    passages = own(tokenizer, CHAT)
    assert [p.mode for p in passages] == [PROMPT, ANSWER, PROMPT, ANSWER]
    end = tokenizer.control_id("<|im_end|>" if template is CHATML else "<|eot_id|>")
    for passage, message in zip(passages[1::2], CHAT[2::2], strict=True):
        assert passage.parts[:2] == (message["content"], end)


@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama3"])
def test_the_ids_are_those_of_transformers(folder, template):
    import transformers

    tokenizer = load(folder, template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = encoded(own(tokenizer, CHAT), tokenizer)
    assert [i for _, ids in ours for i in ids] == theirs.apply_chat_template(
        CHAT, tokenize=True, return_dict=False
    )
    asked = theirs.apply_chat_template(
        CHAT[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert [i for _, ids in ours[:-1] for i in ids] == asked


def test_a_file_next_to_the_tokenizer_may_hold_the_template(folder):
    try:
        (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
        assert load(folder, None).chat_template == CHATML
    finally:
        (folder / "chat_template.jinja").unlink()


def test_a_control_token_in_a_message_is_refused_since_it_could_speak_for_the_assistant(folder):
    tokenizer = load(folder, CHATML)
    for role in (0, 1, 2):
        messages = [dict(message) for message in CHAT]
        messages[role]["content"] += "<|im_end|>"
        with pytest.raises(
            MalformedRecord, match=r"'<\|im_end\|>', a control token that only the template may set"
        ):
            own(tokenizer, messages)


def test_a_template_that_rewrites_earlier_turns_is_refused(folder):
    forgetful = "{% for m in messages[-2:] %}{{ m['role'] + m['content'] }}{% endfor %}"
    with pytest.raises(MalformedRecord, match="does not render it turn by turn"):
        own(load(folder, forgetful), CHAT)


def test_what_the_template_itself_refuses_is_malformed(folder):
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompts') "
        "}}{% endif %}"
    ) + CHATML
    tokenizer = load(folder, strict)
    with pytest.raises(MalformedRecord, match="refuses it: no system prompts"):
        own(tokenizer, CHAT)
    assert own(tokenizer, CHAT[1:])


def test_a_template_cannot_reach_out_of_its_sandbox(folder):
    with pytest.raises(MalformedRecord, match="unsafe"):
        own(load(folder, "{{ messages.__class__.__base__.__subclasses__() }}"), CHAT)


def test_a_tokenizer_without_a_template_or_with_a_broken_one_is_refused(folder):
    with pytest.raises(ChatflowError, match="has no chat template; give a HuggingFaceTokenizer"):
        check_tokenizer_template(load(folder, None))
    with pytest.raises(ChatflowError, match="has no chat template"):
        check_tokenizer_template(load_tokenizer("ByteLevelTokenizer"))
    with pytest.raises(ChatflowError, match="is not Jinja"):
        check_tokenizer_template(load(folder, "{% for"))


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == "
    "'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FORGETFUL = (  # as Qwen3's: what was thought before is not written once the user has spoken again
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == "
    "'assistant' %}{% if loop.last %}<think></think>{% endif %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)


@pytest.mark.parametrize("template", [MARKED, FORGETFUL], ids=["marked", "forgetful"])
def test_ids_and_masks_of_marked_answers_are_those_of_transformers(folder, template):
    import transformers

    tokenizer = load(folder, template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    wanted = theirs.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = encoded(own(tokenizer, CHAT), tokenizer)
    assert [i for _, ids in ours for i in ids] == wanted["input_ids"]
    assert [int(mode == ANSWER) for mode, ids in ours for _ in ids] == wanted["assistant_masks"]
    assert sum(wanted["assistant_masks"]) > 2


def test_marks_in_macros_and_captured_blocks_are_found(folder):
    captured = (
        "{% macro say(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}{% "
        "for m in messages %}"
    )
    captured += (
        "{% set text %}{% if m.role == 'assistant' %}{{ say(m) }}{% else %}{{ m.content }}{% "
        "endif %}{% endset %}{{ text | trim }}|{% endfor %}"
    )
    passages = own(load(folder, captured), CHAT)
    assert [("".join(map(str, p.parts)), p.mode) for p in passages] == [
        ("Be brief.|2 + 2?|", PROMPT), ("4", ANSWER), ("|再说一遍。|", PROMPT), ("四。\n\nDone.",
        ANSWER), ("|", PROMPT),
    ]  # fmt: skip


def test_an_answer_with_weight_0_is_not_trained_on_whether_or_not_answers_are_marked(folder):
    weighted = [
        message | ({"weight": 0} if number == 2 else {}) for number, message in enumerate(CHAT)
    ]
    for template in (MARKED, CHATML):
        conversation = parse_conversation({"messages": weighted})
        tokenizer = load(folder, template)
        passages = mark_untrained(
            CHAT_TEMPLATES["tokenizer"](conversation, tokenizer), conversation.trained
        )
        (answer,) = [p for p in passages if p.mode == ANSWER]
        assert answer.parts[0] == CHAT[4]["content"]
    twice = MARKED.replace(
        "{% endgeneration %}{{", "{% endgeneration %}{% generation %}x{% endgeneration %}{{"
    )
    with pytest.raises(MalformedRecord, match="marks 4 answers in 2 messages"):
        mark_untrained(
            CHAT_TEMPLATES["tokenizer"](conversation, load(folder, twice)), conversation.trained
        )


def test_a_marked_template_asks_for_an_answer_as_an_unmarked_one_does(folder):
    record = {"messages": CHAT[:-1]}
    marked = chat_prompt(record, "tokenizer", load(folder, MARKED))
    plain = chat_prompt(record, "tokenizer", load(folder, CHATML))
    assert (marked.ids, marked.end_ids) == (plain.ids, plain.end_ids)


TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% "
    "endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.reasoning_content %}<think>{{ "
    "m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | "
    "tojson }}</call>{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\\n' }}{% endif %}"
)
CALLED = [
    {"role": "user", "content": "1 + 1?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [1]}}}
        ],
    },
    {"role": "tool", "name": "add", "content": "2"},
    {"role": "assistant", "content": "Two.", "reasoning_content": "It said so."},
]
ADD = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


def test_tools_calls_results_and_reasoning_are_written_as_by_transformers(folder):
    import transformers

    tokenizer = load(folder, TOOLS)
    passages = CHAT_TEMPLATES["tokenizer"](
        parse_conversation({"messages": CALLED, "tools": ADD}), tokenizer
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [i for _, ids in encoded(passages, tokenizer) for i in ids]
    assert ids == theirs.apply_chat_template(CALLED, tools=ADD, tokenize=True, return_dict=False)
    assert [p.mode for p in passages] == [PROMPT, ANSWER, PROMPT, ANSWER]
    assert (
        passages[1].parts[0].startswith("<call>add")
        and passages[3].parts[0] == "<think>It said so.</think>Two."
    )
    text = json.loads(
        json.dumps(CALLED).replace('{"a": 1, "b": [1]}', json.dumps('{"a": 1, "b": [1]}'))
    )
    assert (
        CHAT_TEMPLATES["tokenizer"](parse_conversation({"messages": text, "tools": ADD}), tokenizer)
        == passages
    )


OPTIONS = (
    "",
    "(ensure_ascii=False)",
    "(ensure_ascii=True)",
    "(True)",
    "(indent=4)",
    "(sort_keys=true, separators=(',', ':'))",
)


@pytest.mark.parametrize("options", OPTIONS)
def test_values_become_json_as_by_transformers(folder, options):
    import transformers

    template = TOOLS.replace("(tools | tojson)", f"(tools | tojson{options})")
    tokenizer = load(folder, template.replace("arguments | tojson", f"arguments | tojson{options}"))
    tools = [{"type": "function", "function": ADD[0]["function"] | {"description": "Összead. 加"}}]
    record = parse_conversation({"messages": CALLED, "tools": tools})
    ids = [
        i
        for _, ids in encoded(CHAT_TEMPLATES["tokenizer"](record, tokenizer), tokenizer)
        for i in ids
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert ids == theirs.apply_chat_template(CALLED, tools=tools, tokenize=True, return_dict=False)


@pytest.mark.parametrize("content", ["m.content", "m.content | trim", "m['content'] | string"])
def test_a_call_without_text_writes_what_transformers_writes(folder, content):
    import transformers

    tokenizer = load(folder, TOOLS.replace("m.content or ''", content))
    record = parse_conversation({"messages": CALLED, "tools": ADD})
    ids = [
        i
        for _, ids in encoded(CHAT_TEMPLATES["tokenizer"](record, tokenizer), tokenizer)
        for i in ids
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert ids == theirs.apply_chat_template(CALLED, tools=ADD, tokenize=True, return_dict=False)
    assert "None" not in tokenizer.decode(ids)


def test_a_template_that_needs_the_date_is_refused_and_one_with_a_default_is_not(folder):
    with pytest.raises(ChatflowError, match="fails: it asks for the date .*; write a date into it"):
        check_tokenizer_template(load(folder, "{{ strftime_now('%Y-%m-%d') }}" + CHATML))
    check_tokenizer_template(
        load(folder, "{{ strftime_now('%d') if strftime_now is defined else '26' }}" + CHATML)
    )


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (TOOLS.replace("(tools | tojson)", "''"), "'tools'"),
        (TOOLS.replace("{{ c.function.name }}", ""), "'tool_calls' of message 1"),
        (TOOLS.replace("{{ m.reasoning_content }}", ""), "'reasoning_content' of message 3"),
        (
            TOOLS.replace(
                "{{ m.content or '' }}", "{% if m.role != 'tool' %}{{ m.content or '' }}{% endif %}"
            ),
            r"the content of message 2 \(tool\)",
        ),
    ],
)
def test_what_the_template_leaves_out_is_refused_by_name(folder, template, what):
    with pytest.raises(
        MalformedRecord, match=f"the tokenizer's chat template leaves out {what}: take it out"
    ):
        CHAT_TEMPLATES["tokenizer"](
            parse_conversation({"messages": CALLED, "tools": ADD}), load(folder, template)
        )


def test_of_named_templates_the_default_is_taken(folder):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    assert load(folder, named).chat_template == CHATML
    with pytest.raises(
        ChatflowError, match="chat_template of .* has only tool_use: name one of them default"
    ):
        load(folder, named[:1])
    with pytest.raises(ChatflowError, match="is neither a text nor a list of named templates"):
        load(folder, 3)
