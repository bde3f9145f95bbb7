"""Bad preference pairs and their images: refused by name, or left out of the training and listed."""

import json
import os
from pathlib import Path

from bad_input import Bad, check, table
from PIL import Image
from tiny_world import edit

LEFT_OUT = "1 of 4 pairs cannot be used and are left out, see out/unusable_pairs.jsonl; the first is row 1: "


def pair(**changes):
    """Changes the second pair."""
    return lambda world: edit(world / "pairs.json", lambda pairs: pairs[1].update(changes))


def lines(world: Path) -> bytes:
    """The pairs as JSON lines."""
    return "\n".join(map(json.dumps, json.loads((world / "pairs.json").read_text()))).encode()


def cut(world: Path) -> None:
    os.truncate(world / "images/1.png", 400)


def too_large(world: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(world / "images/1.png")


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def made(metadata: str):
    """A folder of pairs as bootstrapping leaves it, which alone knows where its images are."""

    def prepare(world):
        (world / "made").mkdir()
        (world / "made/metadata.json").write_text(metadata)
        (world / "made/pairs.jsonl").write_bytes(lines(world))
        recipe = world / "run.yaml"
        recipe.write_text(recipe.read_text().replace("image_folder: images", ""))

    return prepare


def left_out(name: str, prepare, reason: str) -> Bad:
    """The second pair of four, without which the training goes on."""
    return Bad(name, prepare, "train --max_steps 1 --max_length 40", LEFT_OUT + reason, left=None, status=0)


@table(
    Bad(
        "an image path that leaves the folder",
        pair(images=["../images/../outside.png"]),
        "train",
        "pairs.json, pair 1: image '../images/../outside.png': found a path that leaves the image folder",
    ),
    Bad(
        "an absolute image path",
        pair(images=["/etc/hostname"]),
        "train",
        "pair 1: image '/etc/hostname': found a path th",
    ),
    Bad(
        "an image path that is none",
        pair(images=[None]),
        "train",
        "pairs.json, record 1: found images [None], expected a",
    ),
    Bad(
        "no image where the paths lead",
        lambda world: [path.unlink() for path in (world / "images").iterdir()],
        "train",
        "pairs.json: found none of its 4 images, the first is images/0.png, expected them; give the image_folder.",
    ),
    Bad(
        "an unknown role",
        pair(prompt=[{"role": "human", "content": "w1"}]),
        "train",
        "pairs.json, record 1: prompt: found a message of role 'human', expected one of system, user, assistant",
    ),
    Bad(
        "a part of an unknown type",
        pair(prompt=[{"role": "user", "content": [{"type": "video"}]}]),
        "train",
        "pairs.json, record 1: prompt: found the part {'type': 'video'}, expected {'type': 'text', 'text': ...} or",
    ),
    Bad(
        "no messages",
        pair(chosen=[]),
        "train",
        "pairs.json, record 1: chosen: found [], expected a text or a list of mess",
    ),
    Bad(
        "an answer of null",
        pair(rejected=None),
        "train",
        "record 1: rejected: found None, expected a text or a list of",
    ),
    Bad(
        "half a surrogate pair in an answer",
        pair(rejected="half \ud83d"),
        "train",
        "pairs.json, record 1: found the text 'half \\ud83d', expected one that a file takes.",
    ),
    Bad("an id of 70 bits", pair(id=2**70), "train", "pairs.json: found a value that is not of its column's type ("),
    Bad(
        "a damaged line",
        lambda world: (world / "pairs.jsonl").write_bytes(lines(world)[:-20]),
        "train --dataset pairs.jsonl",
        "pairs.jsonl: found an error at line 4, column ",
    ),
    Bad(
        "damaged metadata",
        made("{"),
        "train --dataset made",
        "made/metadata.json: found an error at line 1, column 2 (Expecting property name",
    ),
    Bad(
        "metadata that is a list",
        made("[]"),
        "train --dataset made",
        "made/metadata.json: found no image_folder, expected that of the pairs; give one yourself.",
    ),
    Bad(
        "a bad pair, strictly",
        cut,
        "train --strict",
        "found 1 of 4 rows that cannot be trained on (row 1: images/1.png: found a file that cannot be decoded (",
        left=None,
    ),
    Bad(
        "no pair that can be used",
        lambda world: None,
        "train --max_length 5",
        "found 4 of 4 rows that cannot be trained on (row 0: max_length: found 5, expected more than the ",
        left=None,
    ),
    left_out(
        "a missing image", lambda world: (world / "images/1.png").unlink(), "images/1.png: found no such file, exp"
    ),
    left_out("a truncated image", cut, "images/1.png: found a file that cannot be decoded ("),
    left_out(
        "an image of too many pixels", too_large, "images/1.png: found a file that cannot be decoded (Image size ("
    ),
    left_out(
        "an image name of 300 characters", pair(images=[f"{'a' * 300}.png"]), f"images/{'a' * 300}.png: found a fi"
    ),
    left_out(
        "a long prompt", pair(prompt=" ".join(["w1"] * 40)), "max_length: found 40, expected more than the 47 tokens"
    ),
    left_out("an empty answer", pair(chosen=assistant(" ")), "answer: found an empty message of role 'assistant'"),
    left_out(
        "<image> in an answer", pair(rejected="w1 <image>"), "answer: found <image> in the text 'w1 <image>', expect"
    ),
    left_out(
        "<image> in a prompt", pair(prompt="<image> w1"), "prompt: found <image> in the text '<image> w1', expected"
    ),
    left_out(
        "the same answer twice", pair(chosen="w1", rejected="w1"), "chosen and rejected: found the same 2 tokens"
    ),
    left_out(
        "two images for one place", pair(images=["0.png", "1.png"]), "prompt: found 1 image placeholders for 2 ima"
    ),
    Bad(
        "plain strings",
        pair(prompt="w1", chosen="w2", rejected="w3"),
        "train --max_steps 1",
        "(4 pairs, 1 steps)",
        None,
        0,
    ),
)
def test_pairs(bad, world, capsys):
    check(bad, world, capsys)
