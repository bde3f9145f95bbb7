import json
import os
import subprocess
import sys

import pytest

from bpo_fast.runs.folder import claim_folder, held, holds_run, locked_folder, shared_folder


def test_claim_folder(tmp_path):
    settings = {"step": 500, "targets": ("q", "k")}
    run = tmp_path / "deep" / "run"
    assert holds_run(run, settings) is False
    assert not run.exists()
    assert claim_folder(run, settings) is False
    assert json.loads((run / "metadata.json").read_text()) == {"settings": {"step": 500, "targets": ["q", "k"]}}
    (run / "more.txt").touch()
    assert holds_run(run, settings) is True
    assert claim_folder(run, settings) is True
    for function in (holds_run, claim_folder):
        with pytest.raises(
            ValueError, match=r"output_dir: found another run .*\(step is 500 there and 700 here\), expected"
        ):
            function(run, settings | {"step": 700})
        with pytest.raises(ValueError, match=r"\(targets is \['q', 'k'\] there and None here\)"):
            function(run, {"step": 500})


def test_claim_folder_refuses_what_is_no_run(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output_dir: found the file '.*file', expected a folder"):
        claim_folder(tmp_path / "file", {})
    with pytest.raises(
        ValueError, match=r"output_dir: found files but no run\.json in .*, expected this run or an empty"
    ):
        claim_folder(tmp_path, {}, record="run.json")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / ".keep").touch()
    assert claim_folder(hidden, {}) is False


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"settings": []}', b"\xff\xff", b'{"settings": {"a"', b"null"]
)
def test_a_damaged_record_is_one_sentence(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json: found no settings that can be read, expected those of the") as e:
        claim_folder(tmp_path, {}, record="run.json")
    assert "\n" not in str(e.value)
    assert (tmp_path / "run.json").read_bytes() == content


def test_models_and_adapters_are_known_by_their_weights(tmp_path):
    def settings(path, weights):
        return {"adapter": path and {"path": path, "weights": weights}}

    claim_folder(tmp_path, settings("bpo", "sha256:a"))
    assert holds_run(tmp_path, settings("moved/bpo", "sha256:a"))
    claim_folder(tmp_path / "id", settings("owner/name", "hub:owner/name@123"))
    assert holds_run(tmp_path / "id", settings("owner/name", "hub:owner/name"))  # not on this machine yet
    with pytest.raises(ValueError, match="other weights then"):
        holds_run(tmp_path / "id", settings("owner/name", "hub:owner/name@124"))
    for other, sentence in [
        (settings("bpo", "sha256:b"), r"\(adapter 'bpo' had other weights then: it was changed or trained again\)"),
        (settings("sft", "sha256:b"), r"\(adapter is 'bpo' there and 'sft' here\)"),
        (settings(None, None), r"\(adapter is 'bpo' there and None here\)"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            holds_run(tmp_path, other)


def test_a_folder_is_one_process_s_and_leaves_no_trace_where_nothing_was_put_in(tmp_path):
    run = tmp_path / "deep" / "run"
    with locked_folder(run) as folder:
        assert folder == run
        with pytest.raises(ValueError, match=r"output_dir: found another process at work in '.*run', expected none"):
            locked_folder(run).__enter__()
        code = f"from bpo_fast.runs.folder import locked_folder as l; l({str(run)!r}).__enter__()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "found another process at work in" in done.stderr
    assert not (tmp_path / "deep").exists()
    with locked_folder(run), locked_folder(run.parent):
        (run / "metadata.json").touch()
    assert [path.name for path in run.iterdir()] == ["metadata.json"]


def test_what_a_killed_process_left_is_no_hindrance(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".pairs.jsonl.123.tmp").touch()
    (tmp_path / ".keep").touch()
    with locked_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".keep"]


def test_a_lock_taken_between_the_holder_s_end_and_its_removal_does_not_count(tmp_path, monkeypatch):
    """The file that was opened is gone when it is locked: another one would lock its successor."""
    from bpo_fast.runs import folder as module

    flock, calls = module.fcntl.flock, []

    def removed_before(file, operation):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(file)
        return flock(file, operation)

    monkeypatch.setattr(module.fcntl, "flock", removed_before)
    with locked_folder(tmp_path):
        assert len(calls) == 2
        assert os.path.samestat(os.fstat(calls[1].fileno()), (tmp_path / ".lock").stat())


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for path, sentence in [
        (tmp_path / "file", r"output_dir: found the file '.*file', expected a folder; choose another"),
        (tmp_path / "file" / "run", r"run: found that it cannot be written \(Not a directory\), expected room and"),
        (tmp_path / ("x" * 300), r"xx: found that it cannot be written \(File name too long\), expected room and"),
    ]:
        with pytest.raises((OSError, ValueError), match=sentence), locked_folder(path):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_someone_else_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with (
        pytest.raises(OSError, match=r"found that it cannot be written \(Permission denied\), expected room and"),
        locked_folder(tmp_path),
    ):
        pass


def test_processes_of_one_purpose_share_a_folder_that_keeps_the_others_out(tmp_path, monkeypatch):
    monkeypatch.setattr("bpo_fast.runs.folder.LONGEST_START", 0.1)
    run = tmp_path / "run"
    with shared_folder(run, "a") as first:
        (run / "data").mkdir()
        (run / "data/.part.7.tmp").touch()
        with shared_folder(run, "a") as second:
            assert first == second == run
            assert (run / "data/.part.7.tmp").exists()  # a file that another process is writing
            with pytest.raises(ValueError, match=r"found another process at work in .*run'"), locked_folder(run):
                pass
            with pytest.raises(ValueError, match=r"found a process at work in .*run' on something else"):
                shared_folder(run, "b").__enter__()
        with pytest.raises(ValueError, match="on something else"):  # one of purpose a is still there
            shared_folder(run, "b").__enter__()
    assert [path.name for path in run.iterdir()] == ["data"]
    with shared_folder(run, "b"):
        assert not (run / "data/.part.7.tmp").exists()  # nobody was there to write it
    with locked_folder(run), pytest.raises(ValueError, match="found another process at work"), shared_folder(run, "b"):
        pass


def test_a_held_lock_is_given_back_by_a_kill(tmp_path):
    lock = tmp_path / ".part.lock"
    code = (
        "import sys, time; from bpo_fast.runs.folder import held; lock = held(sys.argv[1]); lock.__enter__();"
        "print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with held(lock, wait=False) as mine:
            assert not mine
        process.kill()
        process.wait()
        with held(lock, wait=False) as mine:
            assert mine
    assert not lock.exists()
