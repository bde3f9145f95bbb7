"""Exports hold every pair, in the form that the other project reads."""

import json

import pytest
from shared_run import make_samples, run

from bpo_fast.bootstrap.sft import ChosenOnly
from bpo_fast.cli import main as cli
from bpo_fast.data.export import export_pairs
from bpo_fast.data.pairs import load_preference_dataset


@pytest.fixture
def made(tmp_path):
    """A run's folder, by the name of how it holds its images, and its pairs."""
    records = make_samples(tmp_path)
    run(tmp_path, "path", records)
    run(tmp_path, "embedded", records, embed_images=True)
    return tmp_path, load_preference_dataset(tmp_path / "path")


def text(turns):
    return turns[0]["content"][-1]["text"]


@pytest.mark.parametrize("form", ["llava", "rlaif"])
@pytest.mark.parametrize("images", ["path", "embedded"])
def test_an_exported_file_reads_back_as_the_same_pairs(made, form, images):
    folder, pairs = made
    assert export_pairs(folder / images, folder / "out", form).pairs == len(pairs) == 22
    where = folder / "out" if images == "embedded" else folder / "images"
    back = load_preference_dataset(folder / "out/pairs.json", image_folder=where)
    for name in ("prompt", "chosen", "rejected"):
        assert list(map(text, back[name])) == list(map(text, pairs[name]))
    assert [pair["images"][0].tobytes() for pair in back] == [pair["images"][0].tobytes() for pair in pairs]


def test_llamafactory_gets_its_ranking_form_and_the_entry_that_names_it(made):
    folder, pairs = made
    export_pairs(folder / "path", folder / "out", "llamafactory")
    records = json.loads((folder / "out/pairs.json").read_text())
    assert records[0] == {
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}],
        "chosen": {"from": "gpt", "value": text(pairs[0]["chosen"])},
        "rejected": {"from": "gpt", "value": text(pairs[0]["rejected"])},
        "images": [str(folder / "images/0.png")],
    }
    (entry,) = json.loads((folder / "out/dataset_info.json").read_text()).values()
    assert (entry["file_name"], entry["ranking"], entry["formatting"]) == ("pairs.json", True, "sharegpt")
    assert set(entry["columns"].values()) == set(records[0])


def test_a_chosen_response_alone_is_llavas_own_form_and_no_ranking(made, capsys):
    folder, _ = made
    records = make_samples(folder)
    run(folder, "sft", records, kinds=[ChosenOnly()])
    export_pairs(folder / "sft", folder / "out", "llava")
    exported = json.loads((folder / "out/pairs.json").read_text())
    expected = [record for record in records if record["id"] not in ("5", "17")]
    assert [record["conversations"] for record in exported] == [record["conversations"] for record in expected]
    assert all("rejected_conversations" not in record for record in exported)
    assert cli.main(["export", str(folder / "sft"), "--format", "rlaif", "--output_dir", str(folder / "none")]) == 2
    assert "format: found 22 pairs, none of which rlaif has a place for." in capsys.readouterr().err
    assert not (folder / "none/pairs.json").exists()
    assert cli.main(["export", str(folder / "path"), "--format", "llava", "--output_dir", str(folder / "cli")]) == 0
    assert capsys.readouterr().out == f"22 pairs in {folder / 'cli/pairs.json'}.\n"
