"""What is kept of a benchmark: from a clean tree only, group by group."""

import json

import pytest
from benching import git, group, row


def results_of(repository, output=None, **settings):
    from results import Results

    return Results("kernels", {"device": "cpu"} | settings, output, repository=repository)


def test_results_are_kept_from_a_clean_tree_with_its_commit(repository):
    for name in ("README.md", "docs/benchmarks.md", "bench/results/noise-cpu-float32.json"):
        (repository / name).write_text("written by another benchmark")
    made = results_of(repository).run({"op": (1, lambda progress: group(eager=row(1.0)))})
    kept = json.loads((repository / "bench/results/kernels-cpu.json").read_text())
    assert kept == made
    assert kept["environment"]["commit"] == git(repository, "rev-parse", "--short=12", "HEAD")
    assert kept["groups"]["op"]["rows"]["eager"]["median"] == 1.0
    assert (repository / "bench/results/kernels-cpu.png").stat().st_size > 1000


@pytest.mark.parametrize("changed", ["code.py", "new.py", "bench/new.py"])
def test_nothing_is_kept_from_a_tree_with_uncommitted_changes(repository, tmp_path, capsys, changed):
    (repository / changed).write_text("changed")
    results = results_of(repository)
    sentence = (
        f"bench/results: found uncommitted changes ({changed}), expected a clean tree, so nothing is kept; "
        "commit them, or give --output a path outside bench/results for a trial."
    )
    assert capsys.readouterr().out.strip() == sentence
    results.run({"op": (1, lambda progress: group(eager=row(1.0)))})
    assert list((repository / "bench/results").iterdir()) == []
    printed = capsys.readouterr().out
    assert "| eager |" in printed
    assert sentence in printed
    results_of(repository, repository / "bench/results/other.json").run(
        {"op": (1, lambda progress: group(eager=row(1.0)))}
    )
    assert list((repository / "bench/results").iterdir()) == []
    trial = tmp_path / "trials/trial.json"
    results_of(repository, trial).run({"op": (1, lambda progress: group(eager=row(1.0)))})
    assert json.loads(trial.read_text())["environment"]["commit"].endswith("-dirty")


def test_the_tree_is_judged_at_the_start_of_the_run(repository):
    results = results_of(repository)
    (repository / "code.py").write_text("changed while it ran")
    results.run({"op": (1, lambda progress: group(eager=row(1.0)))})
    assert (repository / "bench/results/kernels-cpu.json").exists()


def test_outside_a_repository_nothing_is_kept(tmp_path, capsys):
    (tmp_path / "bench/results").mkdir(parents=True)
    results_of(tmp_path)
    assert "found no git repository, expected a clean tree" in capsys.readouterr().out


def test_a_killed_run_goes_on_behind_its_last_whole_group(repository):
    measured = []

    def job(title, ends=True):
        def measure(progress):
            measured.append(title)
            if not ends:
                raise KeyboardInterrupt
            return group(eager=row(1.0))

        return 2, measure

    with pytest.raises(KeyboardInterrupt):
        results_of(repository, shape=(1, 2)).run({"a": job("a"), "b": job("b", ends=False)})
    left = [path.name for path in (repository / "bench/results").iterdir()]
    assert left == ["kernels-cpu.partial.json"]
    assert results_of(repository, shape=(1, 3)).result["groups"] == {}
    made = results_of(repository, shape=(1, 2)).run({"a": job("a"), "b": job("b")})
    assert measured == ["a", "b", "b"]
    assert list(made["groups"]) == ["a", "b"]
    assert not list((repository / "bench/results").glob("*.partial.json"))
