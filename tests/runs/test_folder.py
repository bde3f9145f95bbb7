import json

import pytest

from bpo_fast.runs.folder import claim_folder


def test_claim_folder(tmp_path):
    settings = {"step": 500, "targets": ("q", "k")}
    run = tmp_path / "deep" / "run"
    assert claim_folder(run, settings) is False
    assert json.loads((run / "metadata.json").read_text()) == {"settings": {"step": 500, "targets": ["q", "k"]}}
    (run / "more.txt").touch()
    assert claim_folder(run, settings) is True
    with pytest.raises(
        ValueError, match=r"output_dir: found another run .*\(step is 500 there and 700 here\), expected"
    ):
        claim_folder(run, settings | {"step": 700})
    with pytest.raises(ValueError, match=r"\(targets is \['q', 'k'\] there and None here\)"):
        claim_folder(run, {"step": 500})


def test_claim_folder_refuses_what_is_no_run(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output_dir: found the file '.*file', expected a folder"):
        claim_folder(tmp_path / "file", {})
    with pytest.raises(
        ValueError, match=r"output_dir: found files but no run\.json in .*, expected this run or an empty"
    ):
        claim_folder(tmp_path, {}, record="run.json")
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json: found no settings, expected those of the run in this folder"):
        claim_folder(tmp_path, {}, record="run.json")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / ".keep").touch()
    assert claim_folder(hidden, {}) is False
