"""The ways to score answers that scoring.py compares."""

import json

TOY = ["--repeats=1", "--candidates=4", "--answer-tokens=6", "--hidden-size=64", "--intermediate-size=64"]
TOY += ["--num-hidden-layers=2", "--num-attention-heads=2", "--vocab-size=512", "--image-size=28"]
TOY += ["--vision-hidden-size=32", "--vision-layers=2"]


def test_all_ways_give_the_same_log_probs_and_one_that_does_not_is_marked(tmp_path, monkeypatch):
    import scoring

    ways, output = list(scoring.CANDIDATES), tmp_path / "scoring.json"
    monkeypatch.setitem(scoring.CANDIDATES, "wrong", lambda problem: [logp + 1e-3 for logp in problem.ours()])
    assert scoring.main([*TOY, f"--output={output}"]) == 1
    groups = json.loads(output.read_text())["groups"]
    assert list(groups) == ["demo's model", "answers of 6 tokens"]
    for found in groups.values():
        assert [name for name, row in found["rows"].items() if row["agrees"]] == ways
        assert all(0 < row["loss_error"] < 1e-5 for name, row in found["rows"].items() if name != "wrong")
        assert found["rows"][found["reference"]]["time_ratio"] == 1
    assert groups["answers of 6 tokens"]["shape"]["image tokens"] == 4
