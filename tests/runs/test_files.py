import json
import resource

import pytest

from bpo_fast.runs.files import read_json, replacing, write_json, write_jsonl


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "records.jsonl"
    write_jsonl(path, [{"a": "é"}])

    def records():
        yield {"a": 2}
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_jsonl(path, records())
    assert read_json(path) == [{"a": "é"}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["records.jsonl"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with replacing(path) as file:
        file.write("half")
        file.flush()
        assert read_json(path) == {"a": 1}
    assert path.read_text() == "half"


RECORDS = [{"a": "é"}, {"a": None}]
LINES = '{"a": "é"}\n{"a": null}\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_and_lines_are_told_by_their_content_in_any_encoding(tmp_path, name, encoding):
    path = tmp_path / name
    for text in (LINES, LINES.replace("\n", "\r\n"), json.dumps(RECORDS), json.dumps(RECORDS, indent=1)):
        path.write_bytes(text.encode(encoding))
        assert read_json(path) == RECORDS


def test_one_line_is_what_its_file_is_called(tmp_path):
    for name, expected in (("a.json", {"a": 1}), ("a.jsonl", [{"a": 1}])):
        (tmp_path / name).write_text('{"a": 1}\n')
        assert read_json(tmp_path / name) == expected
    (tmp_path / "a.jsonl").write_text("")
    assert read_json(tmp_path / "a.jsonl") == []


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", b"", "found an empty file, expected JSON"),
        (
            "a.json",
            b'[{"a": 1},\n {"a": }]',
            r"found an error at line 2, column 8 \(Expecting value\), expected valid J",
        ),
        ("a.json", b'{"a": 1}\n{"a": 2}\n{"a": }\n', r"found an error at line 3, column 7 \(Expecting value\)"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": }\n', r"found an error at line 3, column 7 \(Expecting value\)"),
        ("a.jsonl", b'[{"a": 1},\n {"a": }]', "found an error at line 1, column 11"),
        ("a.json", b'{"a": 1} {"a": 2}', r"found an error at line 1, column 10 \(Extra data\)"),
        ("a.json", b'{\n"a": 1\n}\n{\n"a": 2\n}', r"found an error at line 4, column 1 \(Extra data\)"),
        ("a.json", b'["\x01"]', r"found an error at line 1, column 3 \(Invalid control character at\)"),
        ("a.json", b'["ok", "\x00"]', r"found an error at line 1, column 9 \(Invalid control character at\)"),
        ("a.json", b'["ok",\n"\xe9"]', "found byte 8, in line 2, that cannot be decoded, expected UTF-8 text"),
        ("a.json", b"\xff\xfe[\x00\x00\xd8", r"found byte \d+, in line 1, that cannot be decoded"),
        ("a.json", b"[" * 100_000, r"found an error \(maximum recursion depth exceeded"),
        ("a.jsonl", b"{}\n" + b"[" * 100_000, r"found an error in line 2 \(maximum recursion depth exceeded"),
        ("a.json", b"[" + b"1" * 5000 + b"]", r"found an error \(Exceeds the limit"),
        (
            "a.json",
            b'[{"a": 1, "b": 2, "a": 3}]',
            r"found an error \(the key 'a' is there twice in {'a': 3, 'b': 2}\)",
        ),
        ("a.jsonl", b'{"b": 1}\n{"a": 1, "a": 1}', r"found an error in line 2 \(the key 'a' is there twice"),
    ],
)
def test_a_damaged_file_is_one_sentence_with_the_place(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: {sentence}") as error:
        read_json(tmp_path / name)
    assert "\n" not in str(error.value)


def test_what_is_not_a_file(tmp_path):
    (tmp_path / "a.json").mkdir()
    for name, found in (("a.json", "a folder"), ("b.json", "no such file"), (f"{'c' * 300}.json", "no such file")):
        with pytest.raises(FileNotFoundError, match=rf"{name}: found {found}, expected a JSON file\."):
            read_json(tmp_path / name)


def test_the_same_content_leaves_a_file_untouched(tmp_path):
    path = tmp_path / "records.jsonl"
    write_jsonl(path, [{"a": 1}])
    before = path.stat()
    write_jsonl(path, [{"a": 1}])
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    write_jsonl(path, [{"a": 2}])
    assert path.stat().st_ino != before.st_ino
    assert path.read_text() == '{"a": 2}\n'


def test_half_a_surrogate_pair_is_written_as_an_escape(tmp_path):
    write_json(tmp_path / "a.json", {"id": "\ud83d", "text": "é"})
    assert read_json(tmp_path / "a.json") == {"id": "\ud83d", "text": "é"}
    write_json(tmp_path / "a.json", {"text": "é"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "text": "é"\n}\n'


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"a\.json: found that it cannot be written \(File too large\), expected room"
        ):
            write_json(tmp_path / "a.json", {"a": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json") == {"a": 1}
    with pytest.raises(OSError, match=r"a\.json: found that it cannot be written \(No such file or directory\)"):
        write_json(tmp_path / "none" / "a.json", {})


def test_errors_of_other_files_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"other\.txt"), replacing(tmp_path / "a.txt"):
        (tmp_path / "other.txt").read_text()
