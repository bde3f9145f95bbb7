import json

import datasets
import numpy as np
import pytest
from PIL import Image

from bpo_fast.data.formats import preference_row
from bpo_fast.data.pairs import fingerprint, load_preference_dataset, write_pairs
from bpo_fast.runs.files import write_json


@pytest.fixture
def pairs(tmp_path):
    """A folder as bootstrapping leaves it, its pictures elsewhere."""
    images, folder = tmp_path / "images", tmp_path / "pairs"
    images.mkdir()
    folder.mkdir()
    for number in range(2):
        Image.new("L", (3, 2), 100 * number).save(images / f"{number}.png")
    rows = [preference_row(f"{n}.png", f"q{n}", f"good {n}", f"bad {n}", id=str(n), score=n / 2) for n in range(2)]
    write_pairs(folder / "pairs.jsonl", rows)
    write_json(folder / "metadata.json", {"settings": {}, "image_folder": str(images)})
    return folder


def test_loads_as_trl_vision_preference_columns(pairs):
    dataset = load_preference_dataset(pairs)
    assert dataset.column_names == ["images", "prompt", "chosen", "rejected", "id", "score"]
    row = dataset[1]
    (image,) = row["images"]
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.full((2, 3, 3), 100))
    content = [{"type": "image", "text": None}, {"type": "text", "text": "q1"}]
    assert row["prompt"] == [{"role": "user", "content": content}]
    assert row["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "good 1"}]}]
    assert row["rejected"][0]["content"][0]["text"] == "bad 1"
    assert (row["id"], row["score"]) == ("1", 0.5)


def test_trl_collates_the_rows(pairs, processor):
    trl = pytest.importorskip("trl.trainer.dpo_trainer", reason="needs trl")
    batch = trl.DataCollatorForVisionPreference(processor)(list(load_preference_dataset(pairs)))
    assert batch["input_ids"].shape[0] == 4
    assert batch["pixel_values"].shape[0] == 4
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 4 * 4


def test_other_places_to_load_from(pairs, tmp_path):
    expected = load_preference_dataset(pairs)
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"2 images of .*pairs\.jsonl are missing, the first is .*0\.png"):
        load_preference_dataset(pairs)
    from_file = load_preference_dataset(pairs / "pairs.jsonl", image_folder=moved)
    assert fingerprint(from_file) == fingerprint(expected)
    from_file.save_to_disk(str(tmp_path / "saved"))
    saved = load_preference_dataset(tmp_path / "saved")
    assert fingerprint(saved) == fingerprint(expected)
    assert saved[1]["images"][0].size == (3, 2)
    with pytest.raises(ValueError, match="image_folder is of no use"):
        load_preference_dataset(tmp_path / "saved", image_folder=moved)


def test_loads_a_published_format(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "1.png")
    row = {"image": "1.png", "question": "q", "chosen": "good", "rejected": "bad", "ds_name": "x"}
    (tmp_path / "rlaif_v.json").write_text(json.dumps([row, row]))
    dataset = load_preference_dataset(tmp_path / "rlaif_v.json")
    assert dataset.column_names == ["images", "prompt", "chosen", "rejected", "id"]
    assert dataset["id"] == ["0", "1"]
    assert dataset[0]["images"][0].size == (2, 2)


def test_fingerprint_tells_pairs_apart(pairs):
    dataset = load_preference_dataset(pairs)
    assert fingerprint(dataset) != fingerprint(dataset.select([1, 0]))
    assert fingerprint(dataset) == fingerprint(dataset.remove_columns("score"))


def test_what_is_not_a_set_of_pairs(pairs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset .*none does not exist"):
        load_preference_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match=r"neither metadata\.json nor a saved data set"):
        load_preference_dataset(tmp_path / "images")
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="lacks the column 'images'"):
        load_preference_dataset(tmp_path / "saved")
    lines = (pairs / "pairs.jsonl").read_text().splitlines()
    for second, message in [
        (json.dumps(json.loads(lines[1]) | {"b": 1}), "pair 1 of .* has other columns than the first one"),
        (json.dumps(json.loads(lines[1]) | {"images": "1.png"}), "row 1 of .* its images must be a list of paths"),
        (json.dumps(json.loads(lines[1]) | {"prompt": "q"}), "a value that is not of its column's type"),
        (json.dumps(json.loads(lines[1]) | {"score": "high"}), "a value that is not of its column's type"),
        ('{"a": 1}', "row 1 of .* is no preference pair: it has the keys a, which are those of no known format"),
        ("{", "not valid JSON: .* at line 2"),
    ]:
        (pairs / "pairs.jsonl").write_text(f"{lines[0]}\n{second}\n")
        with pytest.raises(ValueError, match=message):
            load_preference_dataset(pairs)
    (pairs / "pairs.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no pairs"):
        load_preference_dataset(pairs)
    (pairs / "pairs.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a JSON list of rows, but it holds a dict"):
        load_preference_dataset(pairs / "pairs.json")
    (pairs / "pairs.jsonl").unlink()
    with pytest.raises(ValueError, match="an unfinished bootstrap: run the same bootstrap command again"):
        load_preference_dataset(pairs)
