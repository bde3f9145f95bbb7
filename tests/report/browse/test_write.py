"""The folder of the page: whole at any moment, and nobody else's."""

import json
import re

import pytest
from PIL import Image
from reading import read_page

from bpo_fast.data.formats import preference_row
from bpo_fast.report.browse import write, write_browser


def make_rows(folder, number=600, word="cat"):
    if not (folder / "1.png").exists():  # a thumbnail is known by its image's time of change
        Image.new("RGB", (20, 10), "red").save(folder / "1.png")
    pairs = ((f"A {word}.", f"A {word} and {count} dogs.") for count in range(number))
    path = str(folder / "1.png")
    return [preference_row(path, "What?", *pair, id=f"a{count}") for count, pair in enumerate(pairs)]


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def called(path):
    """The arguments of the one call that a file of data holds, JSON in strings read."""
    name, arguments = re.fullmatch(r"(\w+)\((.*)\);\n", path.read_text(), re.DOTALL).groups()
    *number, text = json.loads(f"[{arguments}]")
    return name, *number, json.loads(text)


def test_the_data_are_all_there_in_files_of_a_few_hundred(tmp_path):
    rows = make_rows(tmp_path)
    counts = write_browser(iter(rows), tmp_path / "page", name="x")
    assert counts == {"pairs": 600, "images": 1, "unreadable": 0}
    (data,) = (tmp_path / "page").glob("data-*")
    assert sorted(path.name for path in data.iterdir()) == ["index.js", *(f"texts-{n:05}.js" for n in range(3))]
    texts = []
    for number in range(3):
        name, which, content = called(data / f"texts-{number:05}.js")
        assert (name, which) == ("bpoTexts", number)
        texts += content
    assert [each["rejected"] for each in texts] == [f"A cat and {count} dogs." for count in range(600)]
    name, index = called(data / "index.js")
    assert (name, index["pairsAFile"], index["id"][599]) == ("bpoIndex", 256, "a599")
    # 9 comes before 10.
    assert index["rank"] == list(range(600))
    assert index["rejectedWords"] == [5] * 600
    assert index["gap"] == [None] * 600


def test_the_page_says_what_it_holds_and_escapes_it(tmp_path):
    rows = make_rows(tmp_path, 4)
    rows[1] |= {"rejected_type": "<b>", "chosen_logp": -1.0, "rejected_logp": -3.5}
    rows[2]["images"] = ["gone"]
    left_out = {f"<i>{number}": 20 - number for number in range(15)}
    write_browser(rows, tmp_path / "page", name="<u>", left_out=left_out)
    page = read_page((tmp_path / "page" / "index.html").read_text())
    assert page.tags.isdisjoint({"i", "u"})
    text = " ".join(" ".join(page.text).split())
    for part in ("The pairs of <u>.", "4 pairs", "2 images", "1 image that cannot be shown", "195 records left out"):
        assert part in text
    assert "<b> 1 25.0 % 2.0 5.0 2.5" in text
    assert "no kind given 3 75.0 % 2.0 5.0" in text
    assert "<i>0 20" in text
    assert "3 other reasons 21" in text
    assert "<i>12" not in text


def test_the_same_pairs_give_the_same_files_and_others_take_their_place(tmp_path):
    page = tmp_path / "page"
    write_browser(make_rows(tmp_path), page, name="x")
    first = files(page)
    write_browser(make_rows(tmp_path), page, name="x")
    assert files(page) == first
    write_browser(make_rows(tmp_path, 3, "dog"), page, name="x")
    assert len(list(page.glob("data-*"))) == 1
    assert not set(files(page)) & {name for name in first if name.startswith("data")}


def test_a_run_that_fails_at_any_pair_leaves_the_page_of_before(tmp_path, monkeypatch):
    page = tmp_path / "page"
    write_browser(make_rows(tmp_path), page, name="x")
    first = files(page)

    def rows(until):
        yield from make_rows(tmp_path, until, "dog")
        raise KeyboardInterrupt

    for until in (0, 1, 599):
        with pytest.raises(KeyboardInterrupt):
            write_browser(rows(until), page, name="x")
        assert files(page) == first
    # Between the data and the page.
    monkeypatch.setattr(write, "document", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_browser(make_rows(tmp_path, 5, "dog"), page, name="x")
    assert first.items() <= files(page).items()
    monkeypatch.undo()
    # What a killed run left goes with the next one.
    (page / "data.unfinished").mkdir()
    (page / "data.unfinished" / "texts-00000.js").write_text("half")
    write_browser(make_rows(tmp_path), page, name="x")
    assert files(page) == first


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("mine")
    with pytest.raises(ValueError, match=r"found files but no browse\.json"):
        write_browser(make_rows(tmp_path), tmp_path / "mine", name="x")
    assert files(tmp_path / "mine") == {"index.html": b"mine"}


def test_no_pairs_make_no_page(tmp_path):
    with pytest.raises(ValueError, match="dataset: found no pairs, expected at least one"):
        write_browser(iter(()), tmp_path / "page", name="x")
    assert not (tmp_path / "page" / "index.html").exists()
