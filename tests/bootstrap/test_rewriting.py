import json

import pytest

from bpo_fast.bootstrap.rewriting import read_template

EXAMPLES = [
    {"question": "Q1?", "response": "A {cat}.", "modified": "A dog."},
    {"question": "Q2?", "response": "One\nline.", "modified": ["Two", "lines."]},
]
CONTENT = {
    "version": "7",
    "prompt": ["Do this ({error}): {instruction}", "", "{examples}", "", "Q: {question}", "A: {response}", "B:"],
    "example": ["Q: {question}", "A: {response}", "B: {modified}"],
    "errors": {"count": {"instruction": ["change", "it."], "examples": EXAMPLES}},
}


def save(path, **changes):
    path.write_text(json.dumps({key: value for key, value in {**CONTENT, **changes}.items() if value is not None}))
    return path


def test_a_prompt_is_the_template_with_what_it_is_asked(tmp_path):
    asked = read_template(save(tmp_path / "t.json")).ask("count", "What is {response}?", "{instruction} {x}")
    assert asked == (
        "Do this (count): change\nit.\n\n"
        "Q: Q1?\nA: A {cat}.\nB: A dog.\n\nQ: Q2?\nA: One\nline.\nB: Two\nlines.\n\n"
        "Q: What is {response}?\nA: {instruction} {x}\nB:"
    )


def test_a_template_may_be_one_line(tmp_path):
    prompt = "Change the {error}: {response}"
    path = save(tmp_path / "t.json", prompt=prompt, example=None, errors={"count": {}, "object": {}})
    assert read_template(path).ask("object", "What?", "A cat.") == "Change the object: A cat."


def test_changed_text_is_another_version_and_changed_layout_is_not(tmp_path):
    path = save(tmp_path / "t.json")
    version = read_template(path).version
    assert version.startswith("7-")
    path.write_text(json.dumps(dict(reversed(CONTENT.items())), indent=4))
    assert read_template(path).version == version
    example = {**EXAMPLES[0], "modified": "A dog!"}
    errors = {"count": {"instruction": "change it.", "examples": [example]}}
    others = {read_template(save(path, version="8")).version, read_template(save(path, errors=errors)).version}
    assert len({version, *others}) == 3


def test_ours_asks_for_each_kind_of_error_in_its_own_words():
    template = read_template()
    assert list(template.errors) == ["object", "attribute", "count", "relation", "text"]
    for error in template.errors:
        prompt = template.ask(error, "What is it?", "A cat.")
        assert prompt.endswith("\n\nQuestion: What is it?\nResponse: A cat.\nModified response:")
        assert prompt.count("\nModified response: ") == 3
    prompts = {template.ask(error, "What is it?", "A cat.") for error in template.errors}
    assert len(prompts) == 5


ANSWER = "One cat sleeps."


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        ("Two cats sleep.", "Two cats sleep."),
        ("  Two cats sleep.\n", "Two cats sleep."),
        ('"Two cats sleep."', "Two cats sleep."),
        ("\u201cTwo cats sleep.\u201d", "Two cats sleep."),
        ('"Two" and "cats"', '"Two" and "cats"'),
        ("Modified response: Two cats sleep.", "Two cats sleep."),
        ("**Modified response**: Two cats sleep.", "Two cats sleep."),
        ('modified response:\n\n"Two cats sleep."', "Two cats sleep."),
        ("Here is the modified response:\n\nTwo cats sleep.", "Two cats sleep."),
        ("Sure, with another count:\n\nTwo cats sleep.", "Two cats sleep."),
        ("Two cats sleep.\n\n(The count is another now.)", "Two cats sleep."),
        ("Two cats sleep.\nQuestion: What next?\nResponse: A dog.", "Two cats sleep."),
        ("Two cats sleep.\n\n**Question:** What next?", "Two cats sleep."),
        ("<think>One to two.\n\nFine.</think>\n\nTwo cats sleep.", "Two cats sleep."),
        ("<think>One to two, or to three", ""),
        ("", ""),
        ("Modified response:", ""),
        ("Question: What is it?", ""),
        ("Three people  are waiting at the bus stop.", ""),
        ("five people are waiting at the bus stop.", ""),
        (
            "Keep the wording, the order and the length of the rest. Write the modified response and nothing else.",
            None,
        ),
    ],
)
def test_of_a_reply_the_modified_response_is_kept(reply, kept):
    template = read_template()
    if kept is None:  # a line of the prompt
        reply = template.prompt.split("\n")[1]
    assert template.keep("count", ANSWER, reply) == (kept or "")


def test_as_many_paragraphs_are_kept_as_the_response_has():
    template = read_template()
    reply = "Two cats:\n\n- black\n- white\n\nA note."
    assert template.keep("count", "A cat:\n\n- black\n- small", reply) == "Two cats:\n\n- black\n- white"
    assert template.keep("count", 'It says "Go".', '"Stop"') == "Stop"
    assert template.keep("count", '"Go"', '"Stop"') == '"Stop"'


def example(**changes):
    return {"errors": {"count": {"instruction": "x", "examples": [{**EXAMPLES[0], **changes}]}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": None}, r"t\.json: found no 'version', expected one\."),
        ({"version": 3}, r"t\.json, version: found 3, expected a text, or a list of its lines"),
        ({"prompt": []}, r"t\.json, prompt: found \[\], expected a text"),
        ({"prompt": ["x", None]}, r"t\.json, prompt: found \['x', None\], expected a text"),
        ({"prompt": "{examples} {instruction}"}, r"prompt: found no \{response\}, expected it among \{response\}, "),
        ({"prompt": "{response} {examples} {cat}"}, r"prompt: found \{cat\}, expected \{response\}, .* alone"),
        ({"example": None}, r"found \{examples\} in the prompt but no 'example', expected the form of one; give both"),
        ({"prompt": "{response} {instruction}"}, r"t\.json: found an 'example', expected none; give both or neither"),
        ({"example": "{response}"}, r"example: found no \{modified\}, expected it among \{response\}, \{modified\}"),
        ({"example": "{response} {modified} {error}"}, r"example: found \{error\}, expected .* alone"),
        ({"errors": []}, r"errors: found \[\], expected an object of kinds of error"),
        ({"errors": {}}, r"errors: found \{\}, expected an object of kinds of error"),
        ({"errors": {"mixed": {}}}, r"errors: found 'mixed', expected the name of one kind of error"),
        ({"errors": {" ": {}}}, r"errors: found ' ', expected the name of one kind of error"),
        ({"errors": {"count": 3}}, r"errors, count: found 3, expected an object"),
        ({"errors": {"count": {"examples": []}}}, r"errors, count: found no 'instruction', expected one"),
        ({"errors": {"count": {"instruction": "x"}}}, r"errors, count: found no 'examples', expected one"),
        (
            {"errors": {"count": {"instruction": "x", "examples": EXAMPLES, "weight": 1}}},
            r"errors, count: found 'weight', expected instruction, examples\.",
        ),
        (
            {"prompt": "{response}", "example": None},
            r"errors, count: found 'instruction', expected nothing, as the prompt has no place for it",
        ),
        ({"errors": {"count": {"instruction": "x", "examples": []}}}, r"count, examples: found \[\], expected a list"),
        (example(modified=3), r"errors, count, examples, 1, modified: found 3, expected a text"),
        (example(modified=" a  {CAT}."), r"examples, 1: found a modified response like the response, expected a chan"),
        (example(note="x"), r"errors, count, examples, 1: found 'note', expected question, response, modified"),
        ({"prompts": "x"}, r"t\.json: found 'prompts', expected version, prompt, errors, example"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_place(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_template(save(tmp_path / "t.json", **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", r"t\.json: found \[1\], expected an object"), ('{"version": "1",', r"t\.json: found an error at line 1")],
)
def test_a_file_that_is_no_object_is_one_sentence(tmp_path, text, message):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_template(tmp_path / "t.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json: found no such file, expected a JSON file"):
        read_template(tmp_path / "none.json")
