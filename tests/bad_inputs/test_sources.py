"""Annotated data sets in their own shapes, damaged: a sentence, a counted skip, or read all the same."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
from bad_input import bomb
from PIL import Image

from bpo_fast.data.mixture import read_sources
from bpo_fast.data.sources import Source


@dataclass(frozen=True)
class Damage:
    """A fault of a data set, and what becomes of it.

    Attributes:
        name: of the case.
        make: changes the folder that it is called with, or its file `data.json`.
        refused: part of the sentence that the whole file is refused with.
        skipped: the cause that its first record is left out for; with neither all records are read.
    """

    name: str
    make: Callable[[Path], object]
    refused: str = ""
    skipped: str = ""


def text(change):
    """Rewrites the file as the bytes made of its text."""
    return lambda folder: (folder / "data.json").write_bytes(change((folder / "data.json").read_text()))


def first(**changes):
    """Changes keys of the first record, in the file's own form: a list, a list spread over lines, or JSON lines."""

    def make(folder):
        whole = (folder / "data.json").read_text()
        records = records_of(whole)
        records[0] |= changes
        (folder / "data.json").write_text(in_form_of(whole, records))

    return make


def said(*texts, speakers=("human", "gpt")):
    turns = [{"from": speakers[number % 2], "value": value} for number, value in enumerate(texts)]
    return first(conversations=turns)


def records_of(whole):
    return json.loads(whole) if whole.startswith("[") else [json.loads(line) for line in whole.splitlines()]


def in_form_of(whole, records):
    if not whole.startswith("["):
        return "\n".join(map(json.dumps, records))
    return json.dumps(records, indent=2 if "\n" in whole.replace("\\n", "") else None)


# Records, and how they lie in the file.
def llava_instruct():
    turns = [("What colors is bus {}?\n<image>", "Bus {} is white."), ("Where is it?", "In Łódź 🚌.")]
    return [record(f"00000003347{n}", f"00000003347{n}.jpg", turns, n) for n in range(4)], None


def sharegpt4v():
    turns = [("<image>\nWhat do you see happening in image {}?", "In the image {}, a man stands.\n\nHe smiles.")]
    return [record(f"00000000000{n}", f"coco/train2017/00000000000{n}.jpg", turns, n) for n in range(4)], 2


def llavar():
    turns = [("<image>\nWhat is the title of book {}?", 'It is "Gray {}".'), ("Who wrote it?", "A. Author.")]
    return [record(f"lr-{n}", f"{n}a1f.jpg", turns, n) for n in range(4)], "lines"


def record(name, image, turns, number):
    texts = [each.format(number) for turn in turns for each in turn]
    said = [{"from": ("human", "gpt")[at % 2], "value": value} for at, value in enumerate(texts)]
    return {"id": name, "image": image, "conversations": said}


DATA_SETS = {"LLaVA-Instruct": llava_instruct, "ShareGPT4V": sharegpt4v, "LLaVAR": llavar}


@pytest.fixture(params=DATA_SETS)
def folder(request, tmp_path):
    records, form = DATA_SETS[request.param]()
    (tmp_path / "images").mkdir()
    for each in records:
        path = tmp_path / "images" / each["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), "red").save(path)
    whole = "\n".join(map(json.dumps, records)) if form == "lines" else json.dumps(records, indent=form)
    (tmp_path / "data.json").write_text(whole)
    return tmp_path


def image(folder: Path) -> Path:
    """The file of the first record's image."""
    return folder / "images" / records_of((folder / "data.json").read_text())[0]["image"]


def to_image(change):
    return lambda folder: change(image(folder))


def out_of_root(folder):
    Image.new("RGB", (6, 4)).save(folder / "outside.jpg")
    first(image="../outside.jpg")(folder)


def link_out_of_root(folder):
    path = image(folder)
    path.rename(folder / "outside.jpg")
    path.symlink_to(folder / "outside.jpg")


def to_folder(folder):
    (folder / "data.json").unlink()
    (folder / "data.json").mkdir()


NOT_FOLLOWED = "an image path that cannot be followed"
NO_TURNS = "no 'conversations' of a question and an answer"
DAMAGES = [
    Damage(
        "cut in half", text(lambda whole: whole[: len(whole) // 2 - 9].encode()), refused="found an error at line "
    ),
    Damage("cut behind a record", text(lambda whole: whole[:-1].encode()), refused="found an error at line "),
    Damage(
        "a comma too many", text(lambda whole: whole.replace('"id"', ', "id"', 1).encode()), "(Expecting property name"
    ),
    Damage("a quotation mark too few", text(lambda whole: whole.replace('"id"', '"id', 1).encode()), "(Expecting ':'"),
    Damage(
        "a key twice", text(lambda whole: whole.replace('"id"', '"id": 1, "id"', 1).encode()), "'id' is there twice"
    ),
    Damage("an empty file", text(lambda whole: b""), refused="found an empty file, expected JSON."),
    Damage(
        "an empty list", text(lambda whole: b"[]"), refused="found no usable record among 0, expected at least one"
    ),
    Damage("an object", text(lambda whole: b'{"data": []}'), refused="found a dict, expected a JSON list of records."),
    Damage("a web page", text(lambda whole: b"<!DOCTYPE html>"), refused="found an error at line 1, column 1 (Expec"),
    Damage("a folder", to_folder, refused="found a folder, expected a JSON file."),
    Damage("no file", lambda folder: (folder / "data.json").unlink(), refused="found no such file, expected a JSON"),
    Damage(
        "Latin-1", text(lambda whole: whole.replace("?", "\xe9", 1).encode("latin-1")), "that cannot be decoded, exp"
    ),
    Damage("nested without end", text(lambda whole: b"[" + b'{"a":' * 100_000), refused="maximum recursion depth"),
    Damage(
        "no images at all", lambda folder: (folder / "images").rename(folder / "moved"), "image_folder: found no fol"
    ),
    Damage("UTF-16", text(lambda whole: whole.encode("utf-16"))),
    Damage("a byte-order mark", text(lambda whole: whole.encode("utf-8-sig"))),
    Damage("line ends of Windows", text(lambda whole: whole.replace("\n", "\r\n").encode())),
    Damage("letters not escaped", text(lambda whole: in_form_of(whole, records_of(whole)).encode("utf-8"))),
    Damage("a number for an id", first(id=7)),
    Damage("NaN for an id", first(id=float("nan"))),
    Damage("keys that nobody knows", first(model="coco", width=float("inf"))),
    Damage(
        "half a surrogate pair", said("<image>\nWhat?", "A \ud83d."), skipped="half a surrogate pair in its text, wh"
    ),
    Damage("half a surrogate pair in an id", first(id="\udc00"), skipped="an id that no file takes"),
    Damage("a missing image", to_image(Path.unlink), skipped="an image that does not exist"),
    Damage("a folder for an image", first(image="."), skipped="an image that does not exist"),
    Damage("no image", first(image=None), skipped="no 'image' path"),
    Damage("a number for an image", first(image=33471), skipped="no 'image' path"),
    Damage("several images", first(image=["1.jpg", "2.jpg"]), skipped="no 'image' path"),
    Damage("a path out of the folder", out_of_root, skipped=NOT_FOLLOWED),
    Damage("an absolute path", first(image="/etc/hostname"), skipped=NOT_FOLLOWED),
    Damage("a link out of the folder", link_out_of_root, skipped=NOT_FOLLOWED),
    Damage("a null byte in a path", first(image="1.jpg\0.png"), skipped=NOT_FOLLOWED),
    Damage("a path of 5,000 characters", first(image="a" * 5000), skipped="an image that does not exist"),
    Damage("null for conversations", first(conversations=None), skipped=NO_TURNS),
    Damage("a text for conversations", first(conversations="What? A cat."), skipped=NO_TURNS),
    Damage("a question alone", said("<image>\nWhat?"), skipped=NO_TURNS),
    Damage(
        "turns the other way", said("A bus.", "<image>\nWhat?", speakers=("gpt", "human")), skipped="no text from 'h"
    ),
    Damage("a turn of null", first(conversations=[None, None]), skipped="no text from 'human' where one is expected"),
    Damage("an answer of null", said("<image>\nWhat?", None), skipped="no text from 'gpt' where one is expected"),
    Damage("no <image>", said("What is it?", "A bus."), skipped="no <image> in the first question"),
    Damage("<image> twice", said("<image><image> Which?", "A bus."), skipped="several <image> in the first question"),
    Damage("no question", said("<image>\n", "A bus."), skipped="an empty question"),
    Damage("no answer", said("<image>\nWhat?", " "), skipped="response: empty"),
    Damage("<image> in an answer", said("<image>\nWhat?", "<image>"), skipped="response: image_tag"),
    Damage("an answer of 351 words", said("<image>\nWhat?", "bus " * 351), skipped="response: too_long"),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.name for damage in DAMAGES])
def test_a_sentence_or_a_counted_skip(damage, folder):
    damage.make(folder)
    source = Source(name="it", annotations=folder / "data.json", image_folder=folder / "images")
    if damage.refused:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            read_sources([source])
        assert damage.refused in str(error.value)
        assert "\n" not in str(error.value)
        return
    selection = read_sources([source])
    assert [sample.record for sample in selection.samples] == ([1, 2, 3] if damage.skipped else [0, 1, 2, 3])
    causes = [cause for _, cause in selection.skipped.counts]
    assert len(causes) == bool(damage.skipped)
    assert all(cause.startswith(damage.skipped) for cause in causes)
    assert [skip.record for skip in selection.skipped] == [0] * len(causes)


def cut(content):
    return content[: len(content) // 2]


def encoded(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (6, 4), "red"), "JPEG", exif=exif)


def animated():
    red, blue = (Image.new("RGB", (6, 4), color) for color in ("red", "blue"))
    return encoded(red, "GIF", save_all=True, append_images=[blue])


RED, GREY = Image.new("RGB", (6, 4), "red"), Image.new("I;16", (6, 4), 128 * 257)
# Name -> the file's bytes, and the sentence of its refusal or the width, height and first pixel that it is read as.
IMAGES = {
    "no bytes": (b"", "cannot identify image file"),
    "a web page": (b"<!DOCTYPE html>", "cannot identify image file"),
    "half a JPEG": (cut(encoded(Image.effect_noise((64, 64), 50), "JPEG")), "image file is truncated"),
    "half a PNG": (cut(encoded(Image.effect_noise((64, 64), 50), "PNG")), "truncated"),
    "a pixel that is no number": (
        encoded(Image.new("F", (1, 1), float("nan")), "TIFF"),
        "a pixel that is not a finite",
    ),
    "just too large": (bomb(8193, 8192), "8193 x 8192 pixels, over the limit of 67,108,864"),
    "a bomb that Pillow warns of": (bomb(12_000, 12_000), "12000 x 12000 pixels, over the limit of 67,108,864"),
    "a bomb that Pillow refuses": (bomb(60_000, 60_000), "Image size (3600000000 pixels) exceeds limit"),
    "a bomb in one direction": (bomb(2**31 - 1, 1), "exceeds limit"),
    "an icon": (encoded(RED, "ICO"), "cannot identify image file"),
    "an animation": (animated(), (6, 4, (255, 0, 0))),
    "turned by its EXIF": (turned(), (4, 6, (254, 0, 0))),
    "16 bits": (encoded(GREY, "PNG"), (6, 4, (128, 128, 128))),
    "transparent": (encoded(Image.new("RGBA", (6, 4), (0, 0, 0, 0)), "PNG"), (6, 4, (255, 255, 255))),
    "CMYK": (encoded(Image.new("CMYK", (6, 4), (0, 0, 0, 255)), "TIFF"), (6, 4, (0, 0, 0))),
}


@pytest.mark.parametrize("where", ["file", "table"])
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_decoded_as_it_is_seen_or_refused_in_a_sentence(tmp_path, name, where, recwarn):
    content, expected = IMAGES[name]
    if where == "file":
        (tmp_path / "0.img").write_bytes(content)
        annotations = [record("0", "0.img", [("<image>What?", "A bus.")], 0)]
        source = Source(name="it", annotations=annotations, image_folder=tmp_path)
    else:
        image = pa.array([{"bytes": content, "path": "0.img"}])
        table = pa.table({"image": image, "q": ["What?"], "a": ["A bus."]})
        with pa.ipc.new_stream(str(tmp_path / "data.arrow"), table.schema) as writer:
            writer.write_table(table)
        columns = {"question": "q", "answer": "a"}
        source = Source(name="it", annotations=tmp_path / "data.arrow", columns=columns)
    samples = read_sources([source]).samples
    assert samples.image_bytes(samples[0]) == content
    if isinstance(expected, str):
        with pytest.raises(
            ValueError, match=r"0\.img: found a file that cannot be decoded \(.*\), expected an"
        ) as error:
            samples.read_image(samples[0])
        assert expected in str(error.value)
    else:
        decoded = samples.read_image(samples[0])
        assert (*decoded.size, decoded.getpixel((0, 0))) == expected
    assert not [warning for warning in recwarn if issubclass(warning.category, Image.DecompressionBombWarning)]
