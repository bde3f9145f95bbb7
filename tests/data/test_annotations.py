import json

import pytest
from PIL import Image

from bpo_fast.data.annotations import Annotation, read_annotations
from bpo_fast.runs.files import write_json


def record(question="<image>\nWhat is this?", answer="A cat.", image="1.png", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "a", "image": image, "conversations": turns, **more}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    return tmp_path


def test_reads_the_first_turn_of_a_llava_file(folder):
    first = record("What is this?\n<image>")
    first["conversations"] += [{"from": "human", "value": "And now?"}, {"from": "gpt", "value": "Still."}]
    path = folder / "data.json"
    path.write_text(json.dumps([first]))
    assert read_annotations(path, folder) == ([Annotation(0, "a", "1.png", "What is this?", "A cat.")], [])
    (folder / "data.jsonl").write_text(json.dumps(first) + "\n\n" + json.dumps(first) + "\n")
    annotations, _ = read_annotations(folder / "data.jsonl", folder)
    assert [annotation.record for annotation in annotations] == [0, 1]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(image="2.png"), "image 2.png does not exist"),
        (record(image=""), "no 'image' path"),
        (record("What is this?"), "no <image> in the first question where one is expected"),
        (record("<image> <image> What?"), "2 <image> in the first question where one is expected"),
        (record("<image>\n"), "an empty question"),
        (record(answer=" \n"), "an empty response"),
        (record(answer="a <image> b"), "<image> in the answer"),
        (record(answer="w " * 8), "a response of 8 words, over max_response_words=7"),
        (record(answer="half \ud83d"), "half a surrogate pair in its text, which no file takes"),
        (record(image="half\ud83d.png"), "image: found 'half\\ud83d.png', a path that no file can have"),
        (record(image="nul\0.png"), "image: found 'nul\\x00.png', a path that no file can have"),
        (record(image=f"{'long' * 100}.png"), "image longlong"),
        (record(image="."), "image . does not exist"),
        (record(image="../outside.png"), "image '../outside.png': found a path that leaves the image folder"),
        (record(image="/etc/hostname"), "image '/etc/hostname': found a path that leaves the image folder"),
        (record(image=None), "no 'image' path"),
        (record(image=["1.png"]), "no 'image' path"),
        (record(conversations=[]), "no 'conversations' of a question and an answer"),
        (
            record(conversations=[{"from": "gpt", "value": "x"}] * 2),
            "no text from 'human' where one is expected in the first two turns",
        ),
        (record(conversations=[{"from": "human", "value": "<image> x"}, {"from": "gpt"}]), "no text from 'gpt'"),
        ({"id": "a", "image": "1.png", "text": "x"}, "no 'conversations'"),
        ("text", "a str where an object is needed"),
    ],
)
def test_a_bad_record_is_skipped_and_listed(folder, bad, reason):
    annotations, skipped = read_annotations([bad, record(answer="w " * 7)], folder, max_response_words=7)
    assert [annotation.record for annotation in annotations] == [1]
    assert [(skip.record, skip.id) for skip in skipped] == [(0, "a" if isinstance(bad, dict) else "0")]
    assert skipped[0].reason.startswith(reason)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[{"id": 1},\n {"id": }]',
            r"data\.json: found an error at line 2, column 9 \(Expecting value\), expected valid JSON",
        ),
        ('{"id": 1}', r"data\.json: found a dict, expected a JSON list of records"),
        ("[]", r"data\.json: found no usable record among 0, expected at least one"),
        ('[{"image": "1.png"}]', r"found no usable record among 1 \(record 0 has no 'conversations'"),
    ],
)
def test_a_bad_file_is_one_sentence(folder, text, message):
    (folder / "data.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_annotations(folder / "data.json", folder)


def test_files_that_cannot_be_read(folder):
    with pytest.raises(FileNotFoundError, match=r"none\.json: found no such file, expected a JSON file"):
        read_annotations(folder / "none.json", folder)
    with pytest.raises(FileNotFoundError, match=r"image_folder: found no folder '.*none', expected"):
        read_annotations([], folder / "none")
    (folder / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(ValueError, match=r"latin\.json: found byte 2, in line 1, that cannot be decoded, expected"):
        read_annotations(folder / "latin.json", folder)
    (folder / "records.jsonl").write_text('{"a": 1}\n\n{"a": 1,}\n')
    with pytest.raises(ValueError, match=r"records\.jsonl: found an error at line 3, column"):
        read_annotations(folder / "records.jsonl", folder)
    with pytest.raises(ValueError, match="max_response_words: found 0, expected at least 1 or None"):
        read_annotations([], folder, max_response_words=0)


def test_an_id_that_no_file_takes_is_skipped_and_listed_readably(folder):
    records = [record(id="half \ud83d"), record(id=None), record(id=2**80)]
    annotations, (skip,) = read_annotations(records, folder)
    assert [annotation.id for annotation in annotations] == ["1", str(2**80)]
    assert (skip.record, skip.id) == (0, "half \\ud83d")
    assert skip.reason == "an id that no file takes, 'half \\ud83d'"
    write_json(folder / "skipped.json", [skip.id, skip.reason])


def test_sample_id_depends_on_the_content_alone():
    first = Annotation(0, "a", "1.png", "What?", "A cat.")
    assert first.sample_id == Annotation(5, "a", "1.png", "What?", "A dog.").sample_id
    others = [Annotation(0, "b", "1.png", "What?", ""), Annotation(0, "a", "2.png", "What?", "")]
    assert len({first.sample_id, *(other.sample_id for other in others)}) == 3
    assert all(0 <= annotation.sample_id < 2**63 for annotation in (first, *others))
