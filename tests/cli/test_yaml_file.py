"""Recipes are read as they are written: numbers, text, and one meaning each."""

import pytest

from bpo_fast.cli.yaml_file import read_yaml


@pytest.fixture
def read(tmp_path):
    def read_text(text, encoding="utf-8"):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
        return read_yaml(path)

    return read_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-7", 1e-7),
        ("2E+3", 2000.0),
        ("-1.5e3", -1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        ("010", 10),
        ("-3", -3),
        ("+3", 3),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("no", "no"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("null", None),
        ("", None),
        ("'1e-7'", "1e-7"),
        ("'null'", "null"),
        ("!!str 5", "5"),
        ("=", "="),
        ("9" * 5000, float("inf")),
    ],
)
def test_a_value_is_what_stands_there(read, text, value):
    found = read(f"key: {{nested: [{text}]}}")["key"]["nested"] if text else [read("key:")["key"]]
    assert found == [value]
    assert type(found[0]) is type(value)


def test_every_scalar_that_python_reads_as_a_number_is_one(read):
    for value in (1e-300, 2e-6, 5e-324, 1.7976931348623157e308, 0.1, 123456789, -0.0):
        assert read(f"key: {value!r}")["key"] == value


def test_encodings_that_say_what_they_are(read):
    assert read("\ufeffkey: grün") == {"key": "grün"}
    assert read("") is None
    assert read("# nothing\n---\n") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: found 'a' a second time, the first is in line 1; keep one of them."),
        ("t:\n  k: {x: 1,\n   x: 1}", "line 3: found 'x' a second time, the first is in line 2; keep one of them."),
        ("'a': 1\na: 1", "line 2: found 'a' a second time"),
        ("a: &b [1]\nc: *b", "line 2: found an alias; write the value out."),
        ("a: &a [*a]", "line 1: found an alias; write the value out."),
        ("1: a", "line 1: found a key that is not text; put it in quotes."),
        ("? [a]\n: b", "line 1: found a key that is not text"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: found the tag 'tag:yaml.org,2002:python/object/apply:os"),
        ("a: !mine 3", "line 1: found the tag '!mine'."),
        ("a: !!int x", "line 1: found 'x' under the tag int; leave the tag out."),
        ("a: !!timestamp 2024-13-45", "line 1: found the tag 'tag:yaml.org,2002:timestamp'."),
        ("a: 1\n---\nb: 2", "line 2, column 1: found a second document, expected one."),
        ("a: 1\n\tb: 2", "line 2, column 1: found a mistake (found character '\\t' that cannot start any token), "),
        ("a: [1\nb: 2", "line 2, column 2: found a mistake (expected ',' or ']', but got ':'), expected YAML."),
        ("a: 1\nb: \x07", "line 2: found the control character U+0007, expected text; delete it."),
        ('a: "b\\0c"', "line 1: found the character U+0000 in a text, expected it on one line; delete it."),
        ("a: |\n  b\n  c\n", "line 1: found the character U+000A in a text"),
        ('a: "\\uD800"', "line 1: found the character U+D800 in a text"),
        ("[" * 3000, "found lists or maps a thousand levels deep, expected a recipe."),
        ("a: " + "x" * (1 << 18), "found more than 262,144 bytes, expected a recipe."),
        (b"a: \xff\xfe", "found byte 3 that no text has, expected a recipe in UTF-8; save it in that encoding."),
        ("a: 1".encode("utf-16"), "found UTF-16 text, expected a recipe in UTF-8; save it in that encoding."),
        ("a: 1".encode("utf-16-le"), "line 1: found the control character U+0000, expected text; delete it."),
    ],
)
def test_what_has_no_or_two_meanings_is_refused_with_its_line(read, text, message, tmp_path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the sentence is compared whole
        read(text)
    sentence = str(caught.value).removeprefix(str(tmp_path / "recipe.yaml"))
    assert sentence.lstrip(":, ").startswith(message)
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_a_bomb_of_aliases_is_refused_at_once(read):
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    with pytest.raises(ValueError, match="line 2: found an alias"):
        read("\n".join(lines))


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(ValueError, match=r"found a file that cannot be read \(Is a directory\), expected a recipe\.$"):
        read_yaml(tmp_path)
