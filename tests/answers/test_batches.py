import json
import random
from dataclasses import dataclass

import pytest
from PIL import Image

from bpo_fast.answers.batches import question_key, respond
from bpo_fast.answers.generate import Response
from bpo_fast.answers.given import GivenModel
from bpo_fast.runs.folder import locked_folder

SETTINGS = {"seed": 0}
RESULTS = ("result.json",)


@dataclass(frozen=True)
class Question:
    id: str
    image: str
    question: str


def make_image(path, seed):
    Image.frombytes("RGB", (16, 16), random.Random(seed).randbytes(768)).save(path)


@pytest.fixture
def questions(tmp_path):
    """Five questions about five images, the third of them damaged; the working folder is run."""
    for number in range(5):
        make_image(tmp_path / f"{number}.png", number)
    path = tmp_path / "2.png"
    path.write_bytes(path.read_bytes()[:60])
    return [Question(letter, f"{number}.png", f"w{number}") for number, letter in enumerate("abcde")]


@pytest.fixture
def asking(tiny_llava, questions, tmp_path):
    """A function that asks questions in batches of two; it returns the responses' texts and the ids of each batch."""

    def ask(questions=questions, given=None, batch_size=2, settings=SETTINGS):
        calls = []

        def answer(model, processor, batch, images):
            assert not model.training
            calls.append("".join(question.id for question in batch))
            return [Response(image.tobytes().hex()[:20], False) for image in images]

        given = given or GivenModel(*tiny_llava)
        with locked_folder(tmp_path / "run") as folder:
            options = {"batch_size": batch_size, "results": RESULTS, "desc": "test"}
            responses, unreadable = respond(folder, settings, given, questions, tmp_path, answer, **options)
        return [response and response.text for response in responses], calls, unreadable

    return ask


def text_of(number):
    return random.Random(number).randbytes(768).hex()[:20]


def test_responses_come_in_order_and_bad_images_are_left_out(tiny_llava, asking, tmp_path):
    tiny_llava[0].train()
    texts, calls, unreadable = asking()
    assert texts == [text_of(0), text_of(1), None, text_of(3), text_of(4)]
    assert calls == ["ab", "de"]
    assert list(unreadable) == ["2.png"]
    assert "2.png: found a file that cannot be decoded" in unreadable["2.png"]
    assert tiny_llava[0].training
    lines = [json.loads(line) for line in (tmp_path / "run/responses.jsonl").read_text().splitlines()]
    assert [(line["id"], line["text"], line["left"]) for line in lines] == [
        ("a", text_of(0), 1),
        ("b", text_of(1), 0),
        ("d", text_of(3), 1),
        ("e", text_of(4), 0),
    ]


def test_only_what_is_new_is_asked(asking, questions, tmp_path, capsys):
    texts, *_ = asking()
    make_image(tmp_path / "2.png", 2)  # mended
    assert asking()[:2] == ([*texts[:2], text_of(2), *texts[3:]], ["c"])
    changed = Question("a", "0.png", "another question")
    added = Question("f", "3.png", "w9")
    assert asking([added, changed, *questions[3:]])[:2] == ([text_of(3), text_of(0), *texts[3:]], ["fa"])
    capsys.readouterr()
    (tmp_path / "run/result.json").touch()
    whole = (tmp_path / "run/responses.jsonl").read_bytes()
    assert asking()[1] == []  # questions that were away come back
    assert "run: finished already, its 5 responses are there." in capsys.readouterr().err
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")  # another file in its place
    assert asking(questions[:2])[1] == ["a"]
    assert (tmp_path / "run/responses.jsonl").read_bytes().startswith(whole)


def test_a_stale_result_is_not_kept_beside_new_responses(asking, questions, tmp_path):
    asking(questions[:2])
    result = tmp_path / "run/result.json"
    result.touch()
    asking(questions[:2])
    assert result.exists()
    asking()
    assert not result.exists()


def test_the_same_question_twice_is_asked_once(asking, questions):
    assert asking([*questions[:2], questions[0]])[:2] == ([text_of(0), text_of(1), text_of(0)], ["ab"])


def test_no_model_is_loaded_for_what_is_there_or_cannot_be(asking, questions, monkeypatch):
    asking()
    monkeypatch.setattr(GivenModel, "load", lambda given: pytest.fail("loaded"))
    assert asking()[1] == []
    with pytest.raises(ValueError, match=r"image_folder: found no image that can be read among 1 \(.*2\.png: found a"):
        asking([questions[2]])


def test_the_folder_is_claimed_once_model_and_processor_were_tried(tiny_llava, asking, tmp_path, monkeypatch):
    with pytest.raises((ValueError, OSError), match="none"):
        asking(given=GivenModel(str(tmp_path / "none")))
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr(tiny_llava[1], "num_additional_image_tokens", 0)
        with pytest.raises(ValueError, match="3 image tokens"):
            asking()
    assert not (tmp_path / "run").exists()
    asking(settings={"seed": 1})
    with pytest.raises(ValueError, match=r"found another run in .*run' \(seed is 1 there and 0 here\)"):
        asking()


def test_an_image_is_known_by_name_and_size(questions, tmp_path):
    first = question_key(questions[0], tmp_path)
    assert first == question_key(questions[0], tmp_path)
    others = [
        Question("b", "0.png", "w0"),
        Question("a", "1.png", "w0"),
        Question("a", "0.png", "w1"),
        Question("a", "none.png", "w0"),
        Question("a", "x" * 300, "w0"),
        Question(0, "0.png", "w0"),
        Question("0", "0.png", "w0"),
    ]
    keys = {first, *(question_key(other, tmp_path) for other in others)}
    assert len(keys) == len(others) + 1
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    assert question_key(questions[0], tmp_path) not in keys
