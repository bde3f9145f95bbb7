"""`bpo-fast browse` on whatever holds preference pairs."""

import json
from pathlib import Path

import pytest
from bad_input import Bad, check, table
from datasets import Dataset, Features, Image, List, Value
from tiny_world import make_world

from bpo_fast.cli import main as cli


@pytest.fixture
def world(tmp_path, monkeypatch):
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(folder):
    """Texts of all pairs of a page, in their order."""
    texts = []
    for path in sorted(Path(folder).glob("data-*/texts-*.js")):
        call = path.read_text()
        texts += json.loads(json.loads(call[call.index('"') : call.rindex('"') + 1]))
    return texts


def test_a_file_of_pairs_with_its_images(world, capsys):
    assert cli.main(["browse", "pairs.json", "--image_folder", "images", "--output_dir", "o"]) == 0
    said = capsys.readouterr().out
    assert said == "4 pairs with 4 images. Next: open o/index.html in a browser\n"
    assert [(each["chosen"], each["rejected"]) for each in shown("o")] == [(f"w3 w{n}", f"w4 w{n}") for n in range(4)]
    assert all(Path("o", each["images"][0]["src"]).is_file() for each in shown("o"))


def test_a_recipe_and_links_in_place_of_thumbnails(world):
    Path("browse.yaml").write_text("image_folder: images\nbrowse: {dataset: pairs.json, link_images: true}\n")
    assert cli.main(["browse", "--config", "browse.yaml"]) == 0
    first = shown("bpo_output/browse")[0]["images"][0]
    assert first == {"name": "0.png", "file": "../../images/0.png", "src": "../../images/0.png"}
    assert not Path("bpo_output/browse/thumbnails").exists()


def test_what_a_bootstrap_made_and_left_out(world, capsys):
    data = json.loads(Path("data.json").read_text())
    data[3]["conversations"][1]["value"] = ""
    Path("data.json").write_text(json.dumps(data))
    assert cli.main(["bootstrap", "--config", "run.yaml", "--output_dir", "made"]) == 0
    Path("images/0.png").write_bytes(b"damaged")
    assert cli.main(["browse", "made"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(
        "3 pairs with 3 images, 1 of which cannot be shown. Next: open bpo_output/browse/index.html"
    )
    page = Path("bpo_output/browse/index.html").read_text()
    assert "<h2>Left out</h2>" in page
    assert "image_weakened" in page
    assert "cannot be decoded" in shown("bpo_output/browse")[0]["images"][0]["reason"]


def test_a_saved_data_set_with_its_images_inside_and_a_published_format(world):
    turn = List({"role": Value("string"), "content": Value("string")})
    features = Features({"images": List(Image()), "prompt": turn, "chosen": turn, "rejected": turn})
    (row, *_) = json.loads(Path("pairs.json").read_text())
    saved = {"images": [[{"bytes": Path("images/0.png").read_bytes(), "path": None}]]}
    saved |= {name: [[{"role": row[name][0]["role"], "content": name}]] for name in ("prompt", "chosen", "rejected")}
    Dataset.from_dict(saved, features=features).save_to_disk("saved")
    assert cli.main(["browse", "saved"]) == 0
    (texts,) = shown("bpo_output/browse")
    assert (texts["turns"], texts["chosen"], texts["rejected"]) == ([["user", "prompt"]], "chosen", "rejected")
    assert (texts["images"][0]["width"], texts["images"][0]["height"]) == (16, 16)

    completions = [{"score": 1, "response": "A cat.", "type": "gt"}, {"score": 0, "response": "A dog.", "type": "hal"}]
    Path("bpo.json").write_text(json.dumps([{"prompt": "What?", "image": "1.png", "completions": completions}]))
    assert cli.main(["browse", "bpo.json", "--image_folder", "images"]) == 0
    (texts,) = shown("bpo_output/browse")
    assert (texts["turns"], texts["chosen"], texts["rejected"]) == ([["user", "What?"]], "A cat.", "A dog.")


def nothing(world):
    pass


def a_folder_of_mine(world):
    (world / "out").mkdir()
    (world / "out" / "index.html").write_text("mine")


@table(
    Bad("no pairs named", nothing, "browse", "--dataset: found nothing, expected a value for each"),
    Bad(
        "no such pairs",
        nothing,
        "browse --dataset none",
        "dataset: found nothing at 'none', expected preference pairs.",
    ),
    Bad(
        "an option that there is not",
        nothing,
        "browse --dataset pairs.json --thumbnail 3",
        "--thumbnail: found an unknown name, expected an option of 'browse'; did you mean --thumbnail_size?",
    ),
    Bad(
        "thumbnails of no size",
        nothing,
        "browse --dataset pairs.json --thumbnail_size 0",
        "thumbnail_size: found 0, expected a whole number from 32 to 4096.",
    ),
    Bad(
        "a folder of something else",
        a_folder_of_mine,
        "browse --dataset pairs.json",
        "output_dir: found files but no browse.json in 'out', expected this run or an empty folder; choose another",
        left=("index.html",),
    ),
)
def test_mistakes(bad, world, capsys):
    check(bad, world, capsys)
