"""What `bpo-fast bootstrap` is asked for reaches the kinds, sources and filters that it names."""

import json
from pathlib import Path

import pytest
from tiny_world import edit, make_world

from bpo_fast.answers.sampling import GenerationSettings
from bpo_fast.bootstrap.error_injected import ErrorInjected
from bpo_fast.bootstrap.filters import FilterOptions
from bpo_fast.bootstrap.image_weakened import ImageWeakened
from bpo_fast.bootstrap.m3po import M3PO
from bpo_fast.bootstrap.self_generated import SelfGenerated
from bpo_fast.bootstrap.sft import ChosenOnly
from bpo_fast.cli import main as cli
from bpo_fast.cli.bootstrap_options import BootstrapArguments
from bpo_fast.cli.recipe import parse_arguments
from bpo_fast.data.pairs import load_preference_dataset


def options(*argv):
    given = ["--model_name_or_path", "m", "--annotations", "a.json", *argv]
    return parse_arguments([BootstrapArguments], given, command="bootstrap")[0].run_options()


def test_every_kind_gets_its_options():
    kinds = options(
        *("--kinds", "m3po", "sft", "error_injected", "self_generated", "image_weakened", "--seed", "7"),
        *("--max_new_tokens", "9", "--noise_steps", "100", "900", "--noise_target", "pixels", "--schedule", "cosine"),
        *("--errors", "count", "mixed", "--server_url", "http://localhost:1/v1", "--server_model", "s"),
        *("--server_concurrency", "5", "--alignment_model", "clip", "--num_candidates", "4"),
        *("--alignment_weight", "0.25", "--alignment_margin", "0.1", "--include_annotation"),
    )["kinds"]
    greedy = GenerationSettings(9)
    m3po, sft, injected, own, weakened = kinds
    assert m3po == M3PO("clip", 4, 0.25, 0.1, True, seed=7, decoding=GenerationSettings(9, do_sample=True))
    assert sft == ChosenOnly()
    assert (injected.errors, injected.seed, injected.decoding) == (("count", "mixed"), 7, greedy)
    assert (injected.server.base_url, injected.server.model) == ("http://localhost:1/v1", "s")
    assert injected.server.max_concurrency == 5
    assert own == SelfGenerated(7, greedy)
    assert weakened == ImageWeakened("pixels", (100, 900), "cosine", 7, greedy)


def test_without_kinds_the_noise_decides():
    assert options()["kinds"] == [ImageWeakened(steps=500)]
    assert options("--noise_step", "null")["kinds"] == [SelfGenerated()]
    assert options("--kinds", "error_injected")["kinds"] == [ErrorInjected()]


def test_filters_and_the_way_of_working_reach_the_run():
    asked = options(
        *("--max_similarity", "0.9", "--max_repetition", "null", "--drop_refusals", "false", "--drop_truncated"),
        *("--min_logp_gap", "0.2", "--score_pairs", "--embed_images", "--rows_per_part", "64", "--ray", "auto"),
        *("--num_shards", "3", "--shard_index", "0"),
    )
    expected = FilterOptions(350, 0.9, None, drop_refusals=False, drop_truncated=True, min_logp_gap=0.2)
    assert asked["filters"] == expected
    names = ("score_pairs", "embed_images", "rows_per_part", "ray", "ray_workers", "num_shards", "shard_index")
    assert [asked[name] for name in names] == [True, True, 64, "auto", None, 3, 0]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A user's folder, the working directory of the test."""
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_candidates", "4"], "num_candidates: found it without the kind m3po, which alone it is for; add m3po"),
        (["--noise_step", "null", "--schedule", "linear"], "schedule: found it without the kind image_weakened"),
        (
            ["--kinds", "error_injected", "--server_model", "s"],
            "server_model: found it without server_url, expected both",
        ),
        (["--num_shards", "2"], "num_shards: found it without shard_index, expected both; give shard_index"),
        (["--ray_workers", "2"], "ray_workers: found it without ray, expected both; give ray"),
        (["--kinds", "image_weakened", "--noise_step", "null"], "noise_step: found null for image_weakened, expected"),
        (["--kinds", "sft", "dpo"], "--kinds: found 'dpo', expected one of '?image_weakened"),
        (["--rows_per_part", "0"], "rows_per_part: found 0, expected a whole number of at least 1"),
        (["--temperature", "0.5"], "temperature: found 0.5, expected None with greedy decoding; set do_sample"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        options(*argv)


RECIPE = """
model_name_or_path: model
bootstrap:
  kinds: [self_generated, sft]
  max_new_tokens: 3
  sources:
    - {name: first, annotations: data.json, image_folder: images, samples: 2}
    - {name: second, annotations: other.json, image_folder: images}
"""


def test_a_recipe_of_several_sources_and_kinds_runs(world, capsys):
    Path("other.json").write_text(Path("data.json").read_text())
    edit(Path("other.json"), lambda records: [record | {"id": f"o{record['id']}"} for record in records])
    Path("several.yaml").write_text(RECIPE)
    assert cli.main(["bootstrap", "--config", "several.yaml", "--output_dir", "out", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- self_generated, first") == shown.count("--- sft, first") == 2
    assert "png (16 x 16 pixels, 1 KiB)" in shown
    assert not Path("out").exists()
    assert cli.main(["bootstrap", "--config", "several.yaml", "--output_dir", "out"]) == 0
    pairs = load_preference_dataset("out")
    assert sorted(set(pairs["source"])) == ["first", "second"]
    assert pairs["rejected_type"] == ["self_generated", "sft"] * 6
    manifest = json.loads(Path("out/manifest.json").read_text())
    counts = {"records": 4, "usable": 4, "asked": 2, "selected": 2, "skipped": {}}
    assert manifest["sources"]["first"] == counts
    assert manifest["counts"]["sources"] == {"first": 4, "second": 8}
    Path("several.yaml").write_text(RECIPE.replace("samples: 2", "sample: 2"))
    assert cli.main(["bootstrap", "--config", "several.yaml", "--output_dir", "out"]) == 2
    assert "sources[0], 'sample': found an unknown name, expected" in capsys.readouterr().err
