"""Of a chat, the turns of the assistant count, with the tokens that end them, whatever template renders it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from orchestrator.builtin import MODEL_DIR
from orchestrator.data import DataError
from tests.orchestrator.data.instruction_files import load_rows, sides, with_template, write_instructions
from tests.orchestrator.data.sample_files import assert_refused

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}OPEN{{ message.content }}CLOSE{% endgeneration %}REST{% else %}{{ message.content }}<|im_end|>"
    "{% endif %}\n{% endfor %}"
)


def marked(opens: str, closes: str, rest: str) -> str:
    return MARKED.replace("OPEN", opens).replace("CLOSE", closes).replace("REST", rest)


# The template, and what is around the content of an answer where it counts.
TEMPLATES = {
    "chatml": (CHATML, "", "<|im_end|>"),
    "without a prompt to answer": (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }} </s>"
        "{% else %}[{{ message.content }}]{% endif %}{% endfor %}",
        " ",
        " </s>",
    ),
    "thinks when asked": (CHATML.replace("assistant\n{%", "assistant\n<think>\n{%"), "", "<|im_end|>"),
    "no end": (
        "{% for message in messages %}{{ message.role }}:\n{{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}",
        "",
        "\n",
    ),
    "marked with its end": (marked("", "<|im_end|>", ""), "", "<|im_end|>"),
    "marked with more than its end": (marked("", "<|im_end|>\n", ""), "", "<|im_end|>"),
    "marked without its end": (marked("", "", "<|im_end|>"), "", "<|im_end|>"),
    "marked between blanks": (marked("  ", "  ", "<|im_end|>"), "  ", "  <|im_end|>"),
    "marked by dashes": (
        marked("", "", "<|im_end|>").replace("{% generation %}", "{%- generation -%}"),
        "",
        "<|im_end|>",
    ),
    "marked and never ended": (marked("", "", ""), "", ""),
}
SAID = ["Hello you", "That is é 漢:\n\n  a list, of words.", "<think> not"]


def chat(*answers: str, system: bool = False) -> list[dict[str, str]]:
    first = [{"role": "system", "content": "You answer."}] if system else []
    turns = [
        [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": answer}]
        for number, answer in enumerate(answers)
    ]
    return [*first, *(message for turn in turns for message in turn)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return tmp_path / "x.jsonl"


@pytest.mark.parametrize("trims", [False, True], ids=["whole", "trimmed"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_each_turn_of_the_assistant_counts_up_to_its_end(tmp_path: Path, rows: Path, name: str, trims: bool) -> None:
    template, before, after = TEMPLATES[name]
    model = with_template(tmp_path / "model", template)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if trims:  # as Llama 3 does: a token of blanks has no characters then
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        tokenizer.save_pretrained(model)
    said = SAID[:2] if name == "thinks when asked" else SAID
    found = load_rows(write_instructions(rows, [{"messages": chat(*said, system=True)}]), model)
    ids, counted = found.input_ids_BT[0], found.counted_BT[0]
    whole = tokenizer.apply_chat_template(chat(*said, system=True), return_dict=False)
    assert ids.tolist() == whole
    # The turns are apart, so each is a run of tokens.
    runs: list[list[int]] = []
    for place, token in enumerate(ids):
        if counted[place]:
            if not counted[place - 1]:
                runs.append([])
            runs[-1].append(token)
    assert [tokenizer.decode(run) for run in runs] == [before + one + after for one in said]


def test_what_follows_the_last_answer_is_left_out(tmp_path: Path, rows: Path) -> None:
    model = with_template(tmp_path / "model", CHATML)
    expected = load_rows(write_instructions(rows, [{"messages": chat("yes")}]), model)
    more = [*chat("yes"), {"role": "user", "content": "Why?"}, {"role": "assistant", "content": " "}]
    assert load_rows(write_instructions(rows, [{"messages": more}]), model).digest == expected.digest


def test_an_empty_turn_does_not_count_and_a_call_of_a_tool_does(tmp_path: Path, rows: Path) -> None:
    template = CHATML.replace("{{ message.content }}", "{{ message.content or message.tool_calls[0].function.name }}")
    template = template.replace("message.content or", "message.content if not message.tool_calls else")
    model = with_template(tmp_path / "model", template)
    calls = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    chats = [
        chat("", "two"),
        [{"role": "user", "content": "Look."}, {"role": "assistant", "content": None, "tool_calls": calls}],
        chat("", "\n"),
    ]
    found = load_rows(write_instructions(rows, [{"messages": one} for one in chats]), model)
    said = [response for _, response in sides(found, AutoTokenizer.from_pretrained(model))]
    assert said == ["two<|im_end|>", "look<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, marked("", "<|im_end|>", "")], ids=["chatml", "marked"])
def test_other_columns_hold_chats_too(tmp_path: Path, rows: Path, template: str) -> None:
    model = with_template(tmp_path / "model", template)
    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = chat("one", "two", "three")
    names = {"user": "human", "assistant": "gpt"}
    renamed = [{"from": names[one["role"]], "value": one["content"]} for one in messages]
    as_messages = load_rows(write_instructions(rows, [{"messages": messages}]), model)
    assert sides(as_messages, tokenizer)[0][1] == "one<|im_end|>two<|im_end|>three<|im_end|>"
    assert load_rows(write_instructions(rows, [{"conversations": renamed}]), model).digest == as_messages.digest
    # Of a prompt and a completion, only the completion's turns are answers.
    both = load_rows(write_instructions(rows, [{"prompt": messages[:3], "completion": messages[3:]}]), model)
    assert (both.input_ids_BT == as_messages.input_ids_BT).all()
    assert sides(both, tokenizer)[0][1] == "two<|im_end|>three<|im_end|>"
    # A turn that opens a chat answers nothing.
    opened = load_rows(write_instructions(rows, [{"messages": messages[1:]}]), model)
    assert sides(opened, tokenizer)[0][1] == "two<|im_end|>three<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, marked("", "<|im_end|>", "")], ids=["chatml", "marked"])
def test_tools_reach_the_template(tmp_path: Path, rows: Path, template: str) -> None:
    template = "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}" + template
    model = with_template(tmp_path / "model", template)
    tools = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}]
    found = load_rows(write_instructions(rows, [{"messages": chat("yes"), "tools": tools}]), model)
    ((prompt, response),) = sides(found, AutoTokenizer.from_pretrained(model))
    assert prompt.startswith("look;")
    assert response == "yes<|im_end|>"


def test_a_tokenizer_whose_padding_has_no_name(tmp_path: Path, rows: Path) -> None:
    model = with_template(tmp_path / "model", marked("", "", "<|im_end|>"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": ""}))
    found = load_rows(write_instructions(rows, [{"messages": chat("yes ")}]), model)
    assert sides(found, AutoTokenizer.from_pretrained(model))[0][1] == "yes <|im_end|>"


def test_the_template_puts_in_the_special_tokens(tmp_path: Path, rows: Path) -> None:
    model = with_template(tmp_path / "model", "{{ bos_token }}" + CHATML)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save_pretrained(model)
    mixed = [{"messages": chat("yes")}, {"prompt": "Say", "completion": " yes"}, {"messages": chat("no")}]
    found = load_rows(write_instructions(rows, mixed), model)
    assert [(row == tokenizer.bos_token_id).sum() for row in found.input_ids_BT] == [1, 1, 1]
    assert [(row == tokenizer.eos_token_id).sum() for row in found.input_ids_BT] == [0, 1, 0]
    assert [said for _, said in sides(found, tokenizer)] == ["yes<|im_end|>", " yes</s>", "no<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            # As some templates drop what was thought in earlier turns.
            CHATML.replace("{{ message.content }}", "{{ message.content if loop.last else message.content[:2] }}"),
            r"line 1: the chat template in .* renders message 1 or one before it differently when others follow, "
            r".*mark them in the template by {% generation %}, or drop the row",
        ),
        ("a chat", "line 1: the chat template in .* shows nothing of what the assistant says: fix the template"),
        (CHATML.replace("message.role", "raise_exception('no')"), "line 1: the chat template in .* does not take the"),
    ],
    ids=["others follow", "nothing", "refuses"],
)
def test_templates_that_do_not_show_the_answers(tmp_path: Path, rows: Path, template: str, said: str) -> None:
    model = with_template(tmp_path / "model", template)
    path = write_instructions(rows, [{"messages": chat("first", "second")}])
    assert_refused_by(model, path, said)


def assert_refused_by(model: Path, path: Path, said: str) -> None:
    assert_refused(lambda path: load_rows(path, model), path, said)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"messages": chat("a")[:1]},
            r"line 2 has a prompt and no response: none of its messages \(user\) is an answer of the role 'assistant'",
        ),
        ({"messages": chat("a")[1:]}, r"line 2 has a prompt and no response: none of its messages \(assistant\)"),
        ({"prompt": chat("a"), "completion": chat("a")[:1]}, r"line 2 has a prompt and no response"),
        ({"messages": []}, "line 2: 'messages' is an empty list"),
        ({"messages": [{"content": "a"}]}, "line 2: a message of 'messages' has no role"),
        ({"messages": chat("a"), "tools": "w1"}, "line 2: 'tools' is of type str"),
        ({"messages": chat("\ud800")}, "line 2: the text has a lone surrogate"),
    ],
)
def test_chats_that_cannot_be_used(tmp_path: Path, rows: Path, row: dict[str, Any], said: str) -> None:
    model = with_template(tmp_path / "model", CHATML)
    rows.write_text(json.dumps({"messages": chat("a")}) + "\n" + json.dumps(row) + "\n")
    assert_refused_by(model, rows, said)


def test_chats_whose_turns_are_all_empty(tmp_path: Path, rows: Path) -> None:
    model = with_template(tmp_path / "model", CHATML)
    path = write_instructions(rows, [{"messages": chat("", " ")}] * 2)
    assert_refused_by(model, path, r"the responses of all rows \(2\) are empty")


def test_a_chat_needs_a_template(tmp_path: Path, rows: Path) -> None:
    path = write_instructions(rows, [{"messages": chat("a")}])
    with pytest.raises(DataError, match=r"line 1 is a chat, and the tokenizer in .* has no chat template: add one"):
        load_rows(path, shutil.copytree(MODEL_DIR, tmp_path / "model"))
