"""Records one at a time: the same records, places and sentences as of the whole file, wherever a window cuts it."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bpo_fast.runs import json_records
from bpo_fast.runs.files import read_json
from bpo_fast.runs.json_records import JsonRecords

RECORDS = [
    {"id": "é", "text": 'q"\\\n😀', "turns": [{"a": [1, -2.5e3, None, True]}]},
    {},
    {"nested": [[[[]]], {"": {}}], "long": "x" * 90},
    1234567,
    "[{",
    [],
    {"a": False},
]
SPREAD = json.dumps(RECORDS, indent=1)


@pytest.mark.parametrize("window", [1, 2, 5, 64, 1 << 20])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_every_record_comes_whole_and_can_be_read_again_by_its_place(tmp_path, monkeypatch, window, encoding):
    monkeypatch.setattr(json_records, "WINDOW", window)
    monkeypatch.setattr(json_records, "_ONE_RECORD", window)
    lines = "".join(f"{json.dumps(record, ensure_ascii=False)}\r\n\n" for record in RECORDS)
    texts = (("a.json", SPREAD), ("a.jsonl", SPREAD), ("b.json", f"\n {json.dumps(RECORDS)}\n"), ("b.jsonl", lines))
    for name, text in (*texts, ("c.json", lines)):
        (tmp_path / name).write_bytes(text.encode(encoding))
        records = JsonRecords(tmp_path / name)
        places, values = zip(*records, strict=True)
        assert list(values) == RECORDS == read_json(tmp_path / name)
        assert records.read(reversed(places)) == RECORDS[::-1]
        assert sorted(places) == list(places)
        assert places[-1] < records.size


@settings(deadline=None)
@given(
    st.sampled_from([("a.json", SPREAD), ("a.jsonl", "\n".join(map(json.dumps, RECORDS)))]),
    st.sampled_from(["cut", "without", *'{}[],:"\\ \n0e-.tN\x01']),
    st.integers(0, 400),
    st.sampled_from([3, 50, 1 << 20]),
)
def test_damage_is_said_as_of_the_whole_file(tmp_path_factory, file, damage, at, window):
    name, text = file
    text = text[:at] + {"cut": "", "without": text[at + 1 :]}.get(damage, damage + text[at:])
    # `read_json` says of a list that is called .jsonl, and damaged, what its first line lacks.
    assume(not (name == "a.jsonl" and text.startswith("[")))
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "WINDOW", window)
        assert outcome(lambda: [record for _, record in JsonRecords(path)]) == outcome(lambda: as_records(path))


def outcome(read):
    try:
        return read()
    except ValueError as error:
        return str(error)


def as_records(path):
    value = read_json(path)
    if not isinstance(value, list):
        raise ValueError(f"{path}: found a {type(value).__name__}, expected a JSON list of records.")
    return value


@pytest.mark.parametrize("window", [4, 1 << 20])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'["ok",\n"\xe9"]', "found byte 8, in line 2, that cannot be decoded, expected UTF-8 text."),
        (b'["\xc3\xa9",\n"\xe2\x82"]', "found byte 8, in line 2, that cannot be decoded, expected UTF-8 text."),
        (
            '["a",\n"b"]'.encode("utf-16")[:-1],
            "found byte 20, in line 2, that cannot be decoded, expected UTF-8 text.",
        ),
    ],
)
def test_bytes_that_are_no_text_are_named_by_their_place(tmp_path, monkeypatch, window, content, sentence):
    monkeypatch.setattr(json_records, "WINDOW", window)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json: {sentence}"):
        list(JsonRecords(tmp_path / "a.json"))


@pytest.mark.parametrize("content", ['[1, "' + "x" * 300, '{"a": 1}\n{"b": "' + "x" * 300], ids=["list", "lines"])
def test_a_record_without_end_is_not_read_for_ever(tmp_path, monkeypatch, content):
    monkeypatch.setattr(json_records, "WINDOW", 8)
    monkeypatch.setattr(json_records, "LONGEST_RECORD", 100)
    (tmp_path / "a.json").write_text(content)
    where = "line 1, column 5" if content[0] == "[" else "line 2, column 1"
    with pytest.raises(
        ValueError, match=rf"a\.json: found a record of over 100 characters at {where}, expected short"
    ):
        list(JsonRecords(tmp_path / "a.json"))
