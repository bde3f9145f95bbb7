"""A run on a local Ray cluster of two workers writes the bytes of one process, a killed worker or not."""

import os
import sys

import pytest
from shared_run import KilledOnce, contents, make_samples, notes, run

pytest.importorskip("ray", reason="needs ray, of the extra 'cluster'")


def test_two_workers_one_of_which_is_killed_write_the_bytes_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of the workers
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # which else leaves a token in the home folder
    records = make_samples(tmp_path)
    run(tmp_path, "one", records)
    kinds = [KilledOnce(str(tmp_path / "ray.notes"), seconds=0.05)]
    pairs = run(tmp_path, "ray", records, kinds=kinds, ray="local", ray_workers=2)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert len(pairs) == 22
    made = [int(name) for _, *names in notes(tmp_path, "ray") for name in names]
    assert sorted(set(made)) == sorted(map(int, pairs["id"]))
    assert len(made) <= 22 + 5  # the batch, here a part, that was in work when its worker was killed
    assert len({process for process, *_ in notes(tmp_path, "ray")} - {str(os.getpid())}) > 1
    assert (tmp_path / "ray.killed").exists()


def test_a_loaded_model_is_refused(tiny_llava, tmp_path):
    from bpo_fast.bootstrap import bootstrap

    records = make_samples(tmp_path)
    with pytest.raises(ValueError, match="ray: found a loaded model, expected the path of one, which every worker lo"):
        bootstrap(*tiny_llava, records, tmp_path / "images", tmp_path / "out", ray="local")
    assert not (tmp_path / "out").exists()
