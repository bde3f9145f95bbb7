import json

import pytest

from bpo_fast.runs.files import claim_folder, read_json, replacing, write_json, write_jsonl


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": "é"}])

    def rows():
        yield {"a": 2}
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_jsonl(path, rows())
    assert read_json(path) == [{"a": "é"}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with replacing(path) as file:
        file.write("half")
        file.flush()
        assert read_json(path) == {"a": 1}
    assert path.read_text() == "half"


def test_claim_folder(tmp_path):
    settings = {"step": 500, "targets": ("q", "k")}
    run = tmp_path / "deep" / "run"
    assert claim_folder(run, settings) is False
    assert json.loads((run / "metadata.json").read_text()) == {"settings": {"step": 500, "targets": ["q", "k"]}}
    (run / "more.txt").touch()
    assert claim_folder(run, settings) is True
    with pytest.raises(ValueError, match=r"holds another run \(step is 500 there and 700 here\)"):
        claim_folder(run, settings | {"step": 700})
    with pytest.raises(ValueError, match=r"\(targets is \['q', 'k'\] there and None here\)"):
        claim_folder(run, {"step": 500})


def test_claim_folder_refuses_what_is_no_run(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        claim_folder(tmp_path / "file", {})
    with pytest.raises(ValueError, match=r"not empty and has no run\.json"):
        claim_folder(tmp_path, {}, record="run.json")
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="does not hold the settings of a run"):
        claim_folder(tmp_path, {}, record="run.json")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / ".keep").touch()
    assert claim_folder(hidden, {}) is False
