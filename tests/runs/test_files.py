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
