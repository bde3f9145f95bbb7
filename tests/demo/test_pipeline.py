"""The demo end to end with few pictures and two training steps; its figures at full size are the demo's own."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from bpo_fast.demo import pipeline, world
from bpo_fast.evaluate.chair import score_chair

SETTINGS = pipeline.DemoSettings(
    num_annotations=24, num_heldout=6, num_probe_pairs=4, train_steps=2, batch_size=2, num_likelihood_scenes=2
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, pipeline.run(folder, seeds=(3,), settings=SETTINGS)


def read(path):
    return json.loads(path.read_text())


def test_results_are_those_of_the_files(finished):
    folder, results = finished
    assert read(folder / "results.json") == results
    (run,) = results["seeds"]
    questions = read(folder / "seed-3" / "heldout" / "descriptions.json")
    for method in ("base", "sft", "bpo"):
        lines = (folder / "seed-3" / "scores" / f"{method}-chair" / "answers.jsonl").read_text().splitlines()
        answers = [json.loads(line)["answer"] for line in lines]
        expected = score_chair(answers, [row["objects"] for row in questions], world.synonym_table())
        assert run["scores"][method]["chair"] == expected
        assert results["mean"][method]["chair"]["response_rate"] == expected["response_rate"]


def test_both_methods_start_from_the_same_model_and_both_move(finished):
    logps = finished[1]["seeds"][0]["logps"]
    assert [[point["step"] for point in history] for history in logps.values()] == [[0, 1, 2]] * 2
    assert logps["bpo"][0] == logps["sft"][0]
    assert logps["bpo"][-1] != logps["sft"][-1] != logps["sft"][0]


def test_held_out_pictures_are_not_trained_on(finished):
    folder = finished[0] / "seed-3"
    seen = {path.read_bytes() for path in (folder / "annotated" / "images").iterdir()}
    assert not seen & {path.read_bytes() for path in (folder / "heldout" / "images").iterdir()}


def test_a_killed_run_goes_on_at_the_unfinished_stage(finished):
    folder, results = finished
    adapters = [folder / "seed-3" / method / "adapter_model.safetensors" for method in pipeline.METHODS]
    before = [path.stat().st_mtime_ns for path in adapters]
    (folder / "results.json").unlink()
    answers = folder / "seed-3" / "scores" / "bpo-chair" / "answers.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:3]))
    assert pipeline.run(folder, seeds=(3,), settings=SETTINGS) == results
    assert [path.stat().st_mtime_ns for path in adapters] == before
    assert len(answers.read_text().splitlines()) == 6


def test_folder_of_another_run_is_refused(finished):
    with pytest.raises(
        ValueError, match=r"output_dir: found another run in .*\(seeds is \[3\] there and \[4\] here\)"
    ):
        pipeline.run(finished[0], seeds=(4,), settings=SETTINGS)


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_are_checked(seeds, tmp_path):
    with pytest.raises(ValueError, match="seeds: found"):
        pipeline.run(tmp_path / "run", seeds=seeds)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.links, self.text, self.open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            assert attrs["alt"]
            self.images.append(attrs["src"])
        if tag in ("script", "link", "iframe"):
            self.links.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_holds_its_pictures_and_the_figures(finished):
    folder, results = finished
    source = (folder / "report.html").read_text()
    page = Page()
    page.feed(source)
    assert page.open == []
    assert page.links == []
    assert not re.search(r"(src|href)=\"(?!data:)", source)
    assert len(page.images) == 3 + 6  # figures and all held-out pictures, of which there are fewer than samples
    for image in page.images:
        assert base64.b64decode(image.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    text = " ".join(page.text)
    for method in ("base", "sft", "bpo"):
        assert f"{100 * results['mean'][method]['chair']['response_rate']:.1f} %" in text


def test_hallucinated_words_are_marked_in_the_report():
    from bpo_fast.demo.report import _marked

    marked = _marked("A red star & two blue squares.", ["blue square"])
    assert marked == "A red star &amp; two <mark>blue squares</mark>."
    assert _marked("A red star.", []) == "A red star."
