import pytest

from bpo_fast.evaluate.questions import normalise_question

OURS = {"id": "1", "image": "1.jpg", "question": "Is there a dog?", "label": "yes"}
POPE = {"question_id": 1, "image": "COCO_val2014_1.jpg", "text": "Is there a snowboard in the image?", "label": "yes"}


def test_names_of_published_files_become_ours():
    expected = {"id": 1, "image": POPE["image"], "question": POPE["text"], "label": "yes"}
    assert normalise_question(POPE, 0) == expected
    assert normalise_question(OURS | {"text": "kept", "question_id": 4}, 0) == OURS | {
        "text": "kept",
        "question_id": 4,
    }
    assert normalise_question({"label": "yes"}, 0) == {"label": "yes"}  # what lacks is for the caller to say


def test_the_tag_of_the_image_is_taken_out():
    for text in ("<image>\nWhat?", "What?\n<image>", " What? "):
        assert normalise_question(OURS | {"question": text}, 0)["question"] == "What?"


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (OURS | {"question": "<image>"}, "record 7: found question '', expected a text"),
        (OURS | {"question": "<image> <image> a?"}, "record 7: found several <image> in its question, expected one"),
        ("text", "record 7: found a str, expected an object"),
        (OURS | {"id": None}, "record 7: found id None, expected a text or a whole number"),
        (OURS | {"id": True}, "record 7: found id True, expected a text or a whole number"),
        (OURS | {"id": 0.5}, "record 7: found id 0.5, expected a text or a whole number"),
        (OURS | {"id": "half \ud83d"}, r"record 7: found id 'half \\ud83d', expected a text"),
        (OURS | {"image": None}, "record 7: found image None, expected the path of an image"),
        (OURS | {"image": 3}, "record 7: found image 3, expected the path of an image"),
        (OURS | {"question": " "}, "record 7: found question '', expected a text"),
        (POPE | {"text": ["Is", "it?"]}, r"record 7: found question \['Is', 'it\?'\], expected a text"),
    ],
)
def test_mistakes_are_one_sentence(record, sentence):
    with pytest.raises(ValueError, match=f"^questions, {sentence}") as error:
        normalise_question(record, 7)
    str(error.value).encode()
