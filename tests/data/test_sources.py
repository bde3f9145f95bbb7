"""Sources as a recipe writes them: what each mistake is told, and what is taken for granted."""

from pathlib import Path

import pytest
import yaml

from bpo_fast.data.sources import Source, parse_sources

RECIPE = Path(__file__).parents[2] / "recipes/bpo-mix.yaml"
ENTRY = {"name": "a", "annotations": "a.json"}


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "sources: found None, expected a list of sources, each with name and annotations."),
        ({}, "sources: found {}, expected a list of sources, each with name and annotations."),
        ([], "sources: found [], expected a list of sources, each with name and annotations."),
        (["a.json"], "sources[0]: found 'a.json', expected a map with name and annotations."),
        ([{"name": "a"}], "sources[0]: found no 'annotations', expected one."),
        ([{"annotations": "a.json"}], "sources[0]: found no 'name', expected one."),
        ([ENTRY | {"imagefolder": "x"}], "sources[0], 'imagefolder': found an unknown name, expected name, "),
        ([ENTRY | {"imagefolder": "x"}], "; did you mean image_folder?"),
        ([ENTRY | {3: "x"}], "sources[0], 3: found an unknown name, expected name, "),
        ([ENTRY, ENTRY], "sources: found the name 'a' twice, expected each source to have its own."),
        ([ENTRY | {"name": " "}], "sources[0]: source, name: found ' ', expected a text."),
        ([ENTRY | {"name": 7}], "sources[0]: source, name: found 7, expected a text."),
        ([ENTRY | {"name": "\ud83d"}], "sources[0]: source, name: found '\\ud83d', expected a text."),
        ([ENTRY | {"annotations": ""}], "source 'a', annotations: found '', expected a path or a data set's name."),
        ([ENTRY | {"annotations": 7}], "source 'a', annotations: found 7, expected a path or a data set's name."),
        ([ENTRY | {"image_folder": ["x"]}], "source 'a', image_folder: found ['x'], expected a text."),
        ([ENTRY | {"split": None}], "source 'a', split: found None, expected a text."),
        ([ENTRY | {"subset": 3}], "source 'a', subset: found 3, expected a text."),
        ([ENTRY | {"samples": 0}], "source 'a', samples: found 0, expected a whole number of at least 1."),
        ([ENTRY | {"samples": "many"}], "source 'a', samples: found 'many', expected a whole number of at least 1."),
        ([ENTRY | {"samples": 1.5}], "source 'a', samples: found 1.5, expected a whole number of at least 1."),
        ([ENTRY | {"samples": True}], "source 'a', samples: found True, expected a whole number of at least 1."),
        ([ENTRY | {"turns": "all"}], "source 'a', turns: found 'all', expected one of first, split, keep."),
        ([ENTRY | {"turns": ["first"]}], "source 'a', turns: found ['first'], expected one of first, split, keep."),
        (
            [ENTRY | {"columns": ["q"]}],
            "source 'a', columns: found ['q'], expected a map from image, question, answer",
        ),
        ([ENTRY | {"columns": {"images": "x"}}], "source 'a', columns, 'images': found an unknown name, expected "),
        ([ENTRY | {"columns": {"image": 3}}], "source 'a', columns, 'image': found 3, expected the name of a column."),
        (
            [ENTRY | {"columns": {"question": "q"}}],
            "columns: found id, image, question, expected question and answer, ",
        ),
        (
            [ENTRY | {"columns": {"question": "q", "answer": "a", "conversations": "c"}}],
            "found id, image, conversations, question, answer, expected question and answer, or conversations.",
        ),
    ],
)
def test_a_mistake_is_one_sentence_with_its_place(value, sentence):
    with pytest.raises(ValueError, match="found") as error:
        parse_sources(value)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_images_lie_beside_the_annotations_unless_a_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.json").write_text("[]")
    assert Source(name="x", annotations="a/b.json").folder == Path("a")
    assert Source(name="x", annotations="a").folder == Path("a")
    assert Source(name="x", annotations="a/b.json", image_folder="c").folder == "c"
    assert Source(name="x", annotations="nobody/on-the-hub").folder is None
    with pytest.raises(FileNotFoundError, match="image_folder: found no folder 'c', expected that of the images"):
        Source(name="x", annotations="a/b.json", image_folder="c").open()


def test_the_recipe_of_the_papers_mix_has_its_counts():
    sources = parse_sources(yaml.safe_load(RECIPE.read_text())["bootstrap"]["sources"])
    assert {source.name: source.samples for source in sources} == {
        "sharegpt4v": 57_906,
        "llavar": 55_445,
        "llava_instruct": 54_359,
    }
    assert sum(source.samples for source in sources) == 167_710
