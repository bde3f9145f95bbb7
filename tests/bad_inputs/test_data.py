"""Bad annotations, questions and images: a sentence or a counted skip, and nothing lost."""

import json
import shutil
from pathlib import Path

import pytest
from bad_input import Bad, bomb, check, table
from PIL import Image
from tiny_world import edit, write

SHARD = "data/part-00000-of-00001.parquet"
PAIRS = (
    "README.md",
    SHARD,
    "manifest.json",
    "metadata.json",
    "parts/00000.json",
    "parts/00000.jsonl",
    "skipped.jsonl",
)
SKIPPED = "3 pairs in out (1 records skipped"
CHAIR = "evaluate --kind chair --synonyms table.json"


def text(name: str, make):
    """Rewrites a file as the bytes that `make` makes of its text."""
    return lambda world: (world / name).write_bytes(make((world / name).read_text()))


def record(number: int = 0, **changes):
    """Changes one annotation."""
    return lambda world: edit(world / "data.json", lambda records: records[number].update(changes))


def answer(words: str):
    return record(conversations=[{"from": "human", "value": "<image>\nw0"}, {"from": "gpt", "value": words}])


def lines(content: str) -> bytes:
    return "\n".join(map(json.dumps, json.loads(content))).encode()


def linked(world: Path) -> None:
    (world / "images/0.png").rename(world / "outside.png")
    (world / "images/0.png").symlink_to(world / "outside.png")


def elsewhere(world: Path) -> None:
    Image.new("RGB", (16, 16)).save(world / "outside.png")
    record(image=str(world / "outside.png"))(world)


def cut(world: Path) -> None:
    path = world / "images/0.png"
    path.write_bytes(path.read_bytes()[:400])


def synonyms(value, objects=("w3",)):
    """A synonym table, and questions with the objects of their images."""

    def prepare(world):
        write(world / "table.json", value)
        edit(world / "questions.json", lambda records: [each | {"objects": objects} for each in records])

    return prepare


def pope(world: Path) -> None:
    """The questions as POPE publishes them: JSON lines called .json, other names, ids that are numbers."""
    records = json.loads((world / "questions.json").read_text())
    for number, record in enumerate(records):
        record |= {"question_id": number, "text": record.pop("question")}
        del record["id"]
    (world / "questions.json").write_bytes(lines(json.dumps(records)))


def skipped(name: str, prepare) -> Bad:
    """A record of four that bootstrapping leaves out."""
    return Bad(name, prepare, "bootstrap", SKIPPED, left=PAIRS, status=0)


def read(name: str, prepare) -> Bad:
    """Unusual, and fine."""
    return Bad(name, prepare, "bootstrap", "4 pairs in out (0 records skipped", left=PAIRS, status=0)


@table(
    Bad(
        "an annotation of no known format",
        lambda world: edit(world / "data.json", lambda records: [{"id": "1"}]),
        "bootstrap",
        "data.json: found no usable record among 1 (record 0 has no 'conversations'",
    ),
    Bad(
        "no file", lambda world: (world / "data.json").unlink(), "bootstrap", "data.json: found no such file, expected"
    ),
    Bad(
        "a folder for a file",
        lambda world: (world / "folder").mkdir(),
        "bootstrap --annotations folder",
        "folder: found no data set that can be read ('a folder without .parquet and .arrow files'), expected",
    ),
    Bad(
        "a file name of 300 characters",
        lambda world: None,
        f"bootstrap --annotations {'a' * 300}",
        "a: found no data set that can be read (",
    ),
    Bad("an empty file", text("data.json", lambda content: b""), "bootstrap", "data.json: found an empty file"),
    Bad(
        "an object for a list",
        lambda world: edit(world / "data.json", lambda records: records[0]),
        "bootstrap",
        "data.json: found a dict, expected a JSON list of records.",
    ),
    Bad(
        "half a file",
        text("data.json", lambda content: content[: len(content) // 2].encode()),
        "bootstrap",
        "data.json: found an error at line 1, column ",
    ),
    Bad(
        "JSON lines, one of them damaged",
        text("data.json", lambda content: lines(content).replace(b'"id": "2"', b'"id" "2"')),
        "bootstrap",
        "data.json: found an error at line 3, column 7 (Expecting ':' delimiter), expected valid JSON.",
    ),
    Bad(
        "bytes that are no text",
        text("data.json", lambda content: content.encode().replace(b"w3", b"\xff\xfe", 1)),
        "bootstrap",
        "that cannot be decoded, expected UTF-8 text.",
    ),
    Bad(
        "a control character",
        text("data.json", lambda content: content.replace("w3", "\x01", 1).encode()),
        "bootstrap",
        "(Invalid control character at), expected valid JSON.",
    ),
    Bad(
        "a key twice",
        text("data.json", lambda content: content.replace('"id": "2"', '"id": "2", "id": "3"').encode()),
        "bootstrap",
        "data.json: found an error (the key 'id' is there twice in {'id': '3'",
    ),
    Bad(
        "brackets without end",
        text("data.json", lambda content: b"[" * 100_000),
        "bootstrap",
        "data.json: found an error (maximum recursion depth exceeded",
    ),
    Bad(
        "a number of 5,000 digits",
        text("data.json", lambda content: content.replace('"id": "2"', f'"id": {"7" * 5000}').encode()),
        "bootstrap",
        "data.json: found an error (Exceeds the limit (4300 digits)",
    ),
    read("UTF-16", text("data.json", lambda content: content.encode("utf-16"))),
    read("UTF-8 with a byte-order mark", text("data.json", lambda content: content.encode("utf-8-sig"))),
    read("JSON lines called .json", text("data.json", lines)),
    read("an id of null", record(id=None)),
    read("a path within the folder that goes up and down", record(image="../images/0.png")),
    skipped("a missing image", lambda world: (world / "images/0.png").unlink()),
    skipped("a truncated image", cut),
    skipped("an image of 0 bytes", lambda world: (world / "images/0.png").write_bytes(b"")),
    skipped("a decompression bomb", lambda world: (world / "images/0.png").write_bytes(bomb(12_000, 12_000))),
    skipped("a folder for an image", record(image=".")),
    skipped("an image name of 300 characters", record(image=f"{'a' * 300}.png")),
    skipped("an image name with a null byte", record(image="nul\0.png")),
    skipped("an image name with half a surrogate pair", record(image="half\ud83d.png")),
    skipped("an image of null", record(image=None)),
    skipped("an absolute path outside the folder", elsewhere),
    skipped("a path up and out", lambda world: (elsewhere(world), record(image="../outside.png")(world))),
    skipped("a link out of the folder", linked),
    skipped("half a surrogate pair in an id", record(id="half \ud83d")),
    skipped("half a surrogate pair in an answer", answer("half \ud83d")),
    skipped("an empty answer", answer(" \n")),
    skipped("<image> in an answer", answer("w3 <image>")),
    skipped("turns of null", record(conversations=None)),
)
def test_annotations(bad, world, capsys):
    check(bad, world, capsys)
    if bad.sentence == SKIPPED:
        (line,) = (world / "out/skipped.jsonl").read_text().splitlines()
        assert json.loads(line)["record"] == 0


@table(
    Bad(
        "an empty synonym",
        synonyms({"w3": ["w3", ""]}),
        CHAIR,
        "synonyms: found the phrase '' for 'w3', expected words.",
    ),
    Bad(
        "a blank synonym",
        synonyms({"w3": ["w3", " "]}),
        CHAIR,
        "synonyms: found the phrase ' ' for 'w3', expected words.",
    ),
    Bad(
        "nested synonyms",
        synonyms({"w3": [["w3"]]}),
        CHAIR,
        "synonyms: found the phrase ['w3'] for 'w3', expected words.",
    ),
    Bad(
        "a number for a synonym",
        synonyms({"w3": [3]}),
        CHAIR,
        "synonyms: found the phrase 3 for 'w3', expected words.",
    ),
    Bad(
        "a text for synonyms",
        synonyms({"w3": "w3"}),
        CHAIR,
        "synonyms: found 'w3' for 'w3', expected a list of at least",
    ),
    Bad(
        "an object twice",
        lambda world: (synonyms({})(world), (world / "table.json").write_text('{"w3": ["w3"], "w3": []}')),
        CHAIR,
        "table.json: found an error (the key 'w3' is there twice",
    ),
    Bad(
        "objects that are a text",
        synonyms({"w3": ["w3"]}, "w3"),
        CHAIR,
        "objects, record 0: found 'w3', expected a list of",
    ),
    Bad(
        "objects of null",
        synonyms({"w3": ["w3"]}, None),
        CHAIR,
        "objects, record 0: found None, expected a list of names.",
    ),
    Bad(
        "an unknown object",
        synonyms({"w3": ["w3"]}, ["w5"]),
        CHAIR,
        "objects, record 0: found 'w5', expected objects of",
    ),
    Bad("POPE's own file", pope, "evaluate", '"num_questions": 4', left=None, status=0),
    Bad(
        "an id of null",
        lambda world: edit(world / "questions.json", lambda records: records[1].update(id=None)),
        "evaluate",
        "questions, record 1: found id None, expected a text or a whole number.",
    ),
    Bad(
        "half a surrogate pair in an id",
        lambda world: edit(world / "questions.json", lambda records: records[1].update(id="half \ud83d")),
        "evaluate",
        "questions, record 1: found id 'half \\ud83d', expected a text or a whole number.",
    ),
    Bad(
        "a label in capitals",
        lambda world: edit(world / "questions.json", lambda records: records[0].update(label="Yes")),
        "evaluate",
        '"num_questions": 4',
        left=("answers.jsonl", "metadata.json", "responses.jsonl", "scores.json", "skipped.jsonl"),
        status=0,
    ),
)
def test_questions(bad, world, capsys):
    check(bad, world, capsys)


@pytest.mark.parametrize("kind", ["16 bits", "transparent"])
def test_an_image_of_another_kind_is_bootstrapped_as_what_it_shows(world, capsys, kind):
    """The same responses as to the image that a person would see."""
    shows = Image.new("RGB", (16, 16), (128, 128, 128))
    for number in range(4):
        shows.save(world / f"images/{number}.png")
    plain = Bad("plain", lambda world: None, "bootstrap --noise_step null", "4 pairs", left=PAIRS, status=0)
    check(plain, world, capsys)
    expected = (world / "out" / SHARD).read_bytes()
    shutil.rmtree(world / "out")
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 127))
    image = Image.new("I;16", (16, 16), 128 * 257) if kind == "16 bits" else clear
    image.save(world / "images/0.png")
    check(plain, world, capsys)
    assert (world / "out" / SHARD).read_bytes() == expected
