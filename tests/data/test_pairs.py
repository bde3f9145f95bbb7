import json

import datasets
import numpy as np
import pytest
from PIL import Image

from bpo_fast.data.formats import preference_row
from bpo_fast.data.pairs import dataset_fingerprint, load_preference_dataset, write_pairs
from bpo_fast.runs.files import write_json


@pytest.fixture
def pairs(tmp_path):
    """A folder as bootstrapping leaves it, its images elsewhere."""
    images, folder = tmp_path / "images", tmp_path / "pairs"
    images.mkdir()
    folder.mkdir()
    for number in range(2):
        Image.new("L", (3, 2), 100 * number).save(images / f"{number}.png")
    written = [preference_row(f"{n}.png", f"q{n}", f"good {n}", f"bad {n}", id=str(n), score=n / 2) for n in range(2)]
    write_pairs(folder / "pairs.jsonl", written)
    write_json(folder / "metadata.json", {"settings": {}, "image_folder": str(images)})
    return folder


def test_loads_as_trl_vision_preference_columns(pairs):
    dataset = load_preference_dataset(pairs)
    assert dataset.column_names == ["images", "prompt", "chosen", "rejected", "id", "score"]
    pair = dataset[1]
    (image,) = pair["images"]
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.full((2, 3, 3), 100))
    content = [{"type": "image", "text": None}, {"type": "text", "text": "q1"}]
    assert pair["prompt"] == [{"role": "user", "content": content}]
    assert pair["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "good 1"}]}]
    assert pair["rejected"][0]["content"][0]["text"] == "bad 1"
    assert (pair["id"], pair["score"]) == ("1", 0.5)


def test_trl_collates_the_pairs(pairs, processor):
    trl = pytest.importorskip("trl.trainer.dpo_trainer", reason="needs trl")
    batch = trl.DataCollatorForVisionPreference(processor)(list(load_preference_dataset(pairs)))
    assert batch["input_ids"].shape[0] == 4
    assert batch["pixel_values"].shape[0] == 4
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 4 * 4


def test_other_places_to_load_from(pairs, tmp_path):
    expected = dataset_fingerprint(load_preference_dataset(pairs))
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError, match=r"pairs\.jsonl: found none of its 2 images, the first is .*0\.png, expected them"
    ):
        load_preference_dataset(pairs)
    from_file = load_preference_dataset(pairs / "pairs.jsonl", image_folder=moved)
    assert dataset_fingerprint(from_file) == expected
    from_file.save_to_disk(str(tmp_path / "saved"))
    saved = load_preference_dataset(tmp_path / "saved")
    assert dataset_fingerprint(saved) == expected
    assert saved[1]["images"][0].size == (3, 2)
    (moved / "1.png").write_bytes((moved / "1.png").read_bytes()[:-1])
    assert dataset_fingerprint(from_file) != expected
    with pytest.raises(ValueError, match=r"image_folder: found .*moved', expected None for .*saved'"):
        load_preference_dataset(tmp_path / "saved", image_folder=moved)


def test_loads_a_published_format(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "1.png")
    record = {"image": "1.png", "question": "q", "chosen": "good", "rejected": "bad", "ds_name": "x"}
    (tmp_path / "rlaif_v.json").write_text(json.dumps([record, record]))
    dataset = load_preference_dataset(tmp_path / "rlaif_v.json")
    assert dataset.column_names == ["images", "prompt", "chosen", "rejected", "id"]
    assert dataset["id"] == ["0", "1"]
    assert dataset[0]["images"][0].size == (2, 2)


def test_plain_strings_are_messages_of_one(pairs):
    expected = load_preference_dataset(pairs)
    plain = [
        {
            "images": [f"{n}.png"],
            "prompt": f"q{n}",
            "chosen": f"good {n}",
            "rejected": f"bad {n}",
            "id": str(n),
            "score": n,
        }
        for n in range(2)
    ]
    plain[1]["prompt"] = [{"role": "user", "content": "q1"}]
    write_pairs(pairs / "pairs.jsonl", plain)
    found = load_preference_dataset(pairs)
    for name in ("prompt", "chosen", "rejected", "id"):
        assert found[name][:] == expected[name][:]


def test_an_image_may_be_missing_as_long_as_there_is_one(pairs, tmp_path):
    (tmp_path / "images" / "0.png").unlink()
    dataset = load_preference_dataset(pairs)
    assert dataset[1]["images"][0].size == (3, 2)
    with pytest.raises(ValueError, match=r"0\.png: found no such file, expected an image"):
        dataset[0]


@pytest.mark.parametrize("content", ["[]", "{}", '{"image_folder": null}', '{"image_folder": 3}'])
def test_metadata_without_an_image_folder_is_named(pairs, tmp_path, content):
    (pairs / "metadata.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"metadata\.json: found no image_folder, expected that of the pairs; give one"
    ):
        load_preference_dataset(pairs)
    assert len(load_preference_dataset(pairs, image_folder=tmp_path / "images")) == 2


def test_damaged_metadata_is_named(pairs):
    (pairs / "metadata.json").write_text('{"image_folder": ')
    with pytest.raises(ValueError, match=r"metadata\.json: found an error at line 1, column 18"):
        load_preference_dataset(pairs)


def test_a_damaged_saved_data_set_is_named(pairs, tmp_path):
    dataset = load_preference_dataset(pairs)
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        dataset.save_to_disk(str(tmp_path / name))
        whole = (tmp_path / name / name).read_bytes()
        for content in (b"", whole[: len(whole) // 2]):
            (tmp_path / name / name).write_bytes(content)
            with pytest.raises(
                ValueError, match=rf"found a saved data set in '.*{name}' that cannot be read \(.*\), exp"
            ):
                load_preference_dataset(tmp_path / name)
    datasets.DatasetDict(train=dataset).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"dataset: found several splits saved in '.*splits', expected one; give the"):
        load_preference_dataset(tmp_path / "splits")
    assert len(load_preference_dataset(tmp_path / "splits" / "train")) == 2


def test_fingerprint_tells_pairs_apart(pairs):
    dataset = load_preference_dataset(pairs)
    assert dataset_fingerprint(dataset) != dataset_fingerprint(dataset.select([1, 0]))
    assert dataset_fingerprint(dataset) == dataset_fingerprint(dataset.remove_columns("score"))
    moods = [dataset.add_column("chat_template_kwargs", [{"mood": mood}] * 2) for mood in ("kind", "curt")]
    assert len({dataset_fingerprint(each) for each in (dataset, *moods)}) == 3


def test_what_is_not_a_set_of_pairs(pairs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset: found nothing at '.*none', expected preference pairs"):
        load_preference_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match=r"dataset: found no metadata\.json in .*images', expected pairs or a saved"):
        load_preference_dataset(tmp_path / "images")
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="saved: found no column 'images', expected images, prompt, chosen, rejected"):
        load_preference_dataset(tmp_path / "saved")
    lines = (pairs / "pairs.jsonl").read_text().splitlines()
    for second, message in [
        (
            json.dumps(json.loads(lines[1]) | {"b": 1}),
            "pair 1: found the columns .*, b, expected those of the first pair",
        ),
        (
            json.dumps(json.loads(lines[1]) | {"images": "1.png"}),
            "record 1: found images '1.png', expected a list of paths",
        ),
        (
            json.dumps(json.loads(lines[1]) | {"images": ["../outside.png"]}),
            r"pairs.jsonl, pair 1: image '../outside.png': found a path that leaves the image folder '.*images'",
        ),
        (
            json.dumps(json.loads(lines[1]) | {"images": ["nul\0.png"]}),
            r"pairs.jsonl, pair 1: image: found 'nul\\x00.png', a path that no file can have",
        ),
        (
            json.dumps(json.loads(lines[1]) | {"prompt": [{"role": "human", "content": "q"}]}),
            "record 1: prompt: found a message of role 'human', expected one of system, user, assistant, tool",
        ),
        (
            json.dumps(json.loads(lines[1]) | {"chosen": None}),
            "record 1: chosen: found None, expected a text or a list of messages",
        ),
        (
            json.dumps(json.loads(lines[1]) | {"chosen": "half \ud83d"}),
            r"record 1: found the text 'half \\ud83d', expected one that a file takes",
        ),
        (
            json.dumps(json.loads(lines[1]) | {"id": "half \ud83d"}),
            "found a value that is not of its column's type .*surrogates not allowed",
        ),
        (json.dumps(json.loads(lines[1]) | {"score": 2**70}), "found a value that is not of its column's type"),
        (
            json.dumps(json.loads(lines[1]) | {"score": "high"}),
            "found a value that is not of its column's type .*, expected prompt, chosen",
        ),
        ('{"a": 1}', "record 1: found the keys a, expected those of a known format"),
        ("{", r"pairs\.jsonl: found an error at line 2, .*, expected valid JSON"),
    ]:
        (pairs / "pairs.jsonl").write_text(f"{lines[0]}\n{second}\n")
        with pytest.raises(ValueError, match=message):
            load_preference_dataset(pairs)
    (pairs / "pairs.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"pairs\.jsonl: found no pairs, expected at least one"):
        load_preference_dataset(pairs)
    (pairs / "pairs.json").write_text("{}")
    with pytest.raises(ValueError, match=r"pairs\.json: found a dict, expected a JSON list of records"):
        load_preference_dataset(pairs / "pairs.json")
    (pairs / "pairs.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"dataset: found an unfinished bootstrap in .*, expected manifest\.json; run the same"
    ):
        load_preference_dataset(pairs)
