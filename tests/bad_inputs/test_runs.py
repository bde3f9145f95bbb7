"""Bad folders, journals, models and questions of bootstrap and evaluate: a sentence, and nothing lost."""

import json
import os
import signal
from pathlib import Path

import pytest
from bad_input import Bad, check, table
from PIL import Image
from tiny_world import edit, write

from bpo_fast.cli import main as cli
from bpo_fast.runs.folder import locked_folder
from bpo_fast.runs.journal import Journal

ANSWERED = ("answers.jsonl", "metadata.json", "responses.jsonl", "scores.json", "skipped.jsonl")
SHARD, JOURNAL, DONE = "data/part-00000-of-00001.parquet", "parts/00000.jsonl", "parts/00000.json"
BOOTSTRAPPED = ("README.md", SHARD, "manifest.json", "metadata.json", DONE, JOURNAL, "skipped.jsonl")
LEFT = {"bootstrap": BOOTSTRAPPED, "evaluate": ANSWERED}
JOURNALS = {"bootstrap": JOURNAL, "evaluate": "responses.jsonl"}


def files(folder):
    """Names of the files below a folder, hidden ones apart."""
    found = (path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())
    return sorted(str(path) for path in found if not path.name.startswith("."))


def run(command, *options):
    return cli.main([command, "--config", "run.yaml", "--output_dir", "out", *options])


def after(command, change):
    """A `prepare` that runs `command` to its end, and then makes a change in the world."""

    def prepare(world):
        assert run(command) == 0
        change(world)

    return prepare


def line(number, content, journal="responses.jsonl"):
    """A change: the line of the journal gets another content; a bootstrap has to look at it again."""

    def change(world):
        path = world / "out" / journal
        (world / "out" / DONE).unlink(missing_ok=True)
        lines = path.read_bytes().split(b"\n")
        lines[number - 1] = content
        path.write_bytes(b"\n".join(lines))

    return change


def content(name, data):
    return lambda world: (world / name).write_bytes(data)


def cut(name, size=60):
    return lambda world: (world / name).write_bytes((world / name).read_bytes()[:size])


def question(number, **fields):
    """A change: the fields of one question get other values."""
    return lambda world: edit(world / "questions.json", lambda records: records[number].update(fields))


@table(
    Bad(
        "garbage in the middle of the responses of a bootstrap",
        after("bootstrap", line(2, b"garbage", JOURNAL)),
        "bootstrap",
        "out/parts/00000.jsonl, line 2: found 'garbage', expected a record of key, id, kind, made, left; delete",
        left=tuple(name for name in BOOTSTRAPPED if name != DONE),
    ),
    Bad(
        "a response that is no object",
        after("evaluate", line(3, b"[1, 2]")),
        "evaluate",
        "out/responses.jsonl, line 3: found '[1, 2]', expected a record of key, text, truncated, left; delete the",
        left=ANSWERED,
    ),
    Bad(
        "a response without its text",
        after("evaluate", line(1, b'{"key": "a", "truncated": false, "left": 1}')),
        "evaluate",
        "out/responses.jsonl, line 1: found ",
        left=ANSWERED,
    ),
    Bad(
        "responses that are not UTF-8",
        after("evaluate", line(4, b"\xff\xfe\x00{")),
        "evaluate",
        "out/responses.jsonl, line 4: found ",
        left=ANSWERED,
    ),
    Bad(
        "a file of another kind where the responses were",
        after("bootstrap", content(f"out/{JOURNAL}", b"\x89PNG rest")),
        "bootstrap --max_response_words 300",
        "out/parts/00000.jsonl, line 1: found ",
        left=BOOTSTRAPPED,
    ),
    *(
        Bad(
            f"settings of a run that are {name}",
            after("evaluate", content("out/metadata.json", data)),
            "evaluate",
            "out/metadata.json: found no settings that can be read, expected those of the run in this folder; choose",
            left=ANSWERED,
        )
        for name, data in (("empty", b""), ("no object", b"[]"), ("cut", b'{"settings": {"'), ("binary", b"\xff\x00"))
    ),
    Bad(
        "settings of a run that are gone",
        after("bootstrap", lambda world: (world / "out/metadata.json").unlink()),
        "bootstrap",
        "output_dir: found files but no metadata.json in 'out', expected this run or an empty folder; choose another",
        left=tuple(name for name in BOOTSTRAPPED if name != "metadata.json"),
    ),
    Bad(
        "another option in the folder of a run",
        after("bootstrap", lambda world: None),
        "bootstrap --noise_step 600",
        "output_dir: found another run in 'out' (image_weakened.steps is [500] there and [600] here), expected",
        left=BOOTSTRAPPED,
    ),
    Bad(
        "another data type in the folder of a run",
        after("evaluate", lambda world: None),
        "evaluate --dtype bfloat16",
        "output_dir: found another run in 'out' (dtype is 'auto' there and 'bfloat16' here), expected",
        left=ANSWERED,
    ),
    Bad(
        "a file where the folder should be",
        lambda world: (world / "out").touch(),
        "evaluate",
        "output_dir: found the file 'out', expected a folder; choose another output_dir.",
        left=None,
    ),
    Bad(
        "a folder below a file",
        lambda world: None,
        "evaluate --output_dir data.json/scores",
        "data.json/scores: found that it cannot be written (Not a directory), expected room and permission for it;",
    ),
    Bad(
        "a folder whose name is too long",
        lambda world: None,
        f"bootstrap --output_dir {'x' * 300}",
        "x: found that it cannot be written (File name too long), expected room and permission for it;",
    ),
    Bad(
        "options set to null",
        lambda world: None,
        "bootstrap --seed null",
        "--seed: found null, expected a whole number",
    ),
    Bad(
        "a bad label",
        question(3, label="maybe"),
        "evaluate --model_name_or_path none",  # found before the model is looked for
        "labels, record 3: found 'maybe', expected 'yes' or 'no'.",
    ),
    Bad(
        "an unknown object",
        lambda world: (
            edit(world / "questions.json", lambda records: [record | {"objects": ["elk"]} for record in records]),
            write(world / "table.json", {"dog": ["dog"]}),
        ),
        "evaluate --kind chair --synonyms table.json --model_name_or_path none",
        "objects, record 0: found 'elk', expected objects of the synonym table; add it there.",
    ),
    Bad(
        "an id that is there twice",
        question(2, id="0"),
        "evaluate --model_name_or_path none",
        "questions, record 2: found the id '0' that record 0 has, expected one of its own.",
    ),
    Bad(
        "an id that no file takes",
        question(2, id="\ud83d"),
        "evaluate",
        "questions, record 2: found id '\\ud83d', expected a text or a whole number",
    ),
    Bad(
        "an image that is cut off, of a question",
        cut("images/1.png"),
        "evaluate",
        "1 question whose image cannot be read is left out, see skipped.jsonl",
        left=ANSWERED,
        status=0,
    ),
    Bad(
        "an image of a question that is not there, by a name of 300 characters",
        question(0, image="x" * 300 + ".png"),
        "evaluate",
        '"num_skipped": 1',
        left=ANSWERED,
        status=0,
    ),
    Bad(
        "an image outside the folder of images",
        lambda world: (Image.new("RGB", (4, 4)).save(world / "secret.png"), question(0, image="../secret.png")(world)),
        "evaluate",
        '"num_skipped": 1',
        left=ANSWERED,
        status=0,
    ),
    Bad(
        "no image that can be read",
        lambda world: [cut(f"images/{number}.png")(world) for number in range(4)],
        "evaluate --model_name_or_path model",
        "image_folder: found no image that can be read among 4 (images/0.png: found a file that cannot be decoded",
    ),
    Bad(
        "an image that is cut off, of an annotation",
        cut("images/1.png"),
        "bootstrap",
        "3 pairs in out (1 records skipped",
        left=BOOTSTRAPPED,
        status=0,
    ),
)
def test_bad_runs(bad, world, capsys):
    check(bad, world, capsys)


@pytest.mark.parametrize("command", ["bootstrap", "evaluate"])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model_name_or_path", "modle"], "model: found no folder 'modle'"),
        (["--adapter", "adaptor"], "adapter: found no folder 'adaptor'"),
        (["--batch_size", "0"], "batch_size: found 0, expected a whole number of at least 1"),
    ],
)
def test_the_corrected_command_runs_after_a_mistake(command, options, sentence, world, capsys):
    assert run(command, *options) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("out").exists()
    assert run(command) == 0
    assert files("out") == sorted(LEFT[command])


@pytest.mark.parametrize("command", ["bootstrap", "evaluate"])
def test_a_second_process_in_a_folder_is_refused_before_any_work(command, world, capsys, monkeypatch):
    for taken in (False, True):  # an empty folder, and that of a run
        with locked_folder("out"), monkeypatch.context() as patch:
            patch.setattr("bpo_fast.answers.batches.unreadable_images", lambda *_: pytest.fail("began to work"))
            patch.setattr("bpo_fast.bootstrap.work.Worker.make_all", lambda *_: pytest.fail("began to work"))
            patch.setattr("bpo_fast.runs.folder.LONGEST_START", 0.1)
            assert run(command) == 2
        error = capsys.readouterr().err
        assert "output_dir: found another process at work in 'out', expected none; wait for it or" in error
        if not taken:
            assert run(command) == 0


@pytest.mark.parametrize("command", ["bootstrap", "evaluate"])
def test_the_line_that_is_named_can_be_deleted(command, world, capsys):
    assert run(command) == 0
    journal = Path("out", JOURNALS[command])
    before = {name: Path("out", name).read_bytes() for name in files("out") if name != JOURNALS[command]}
    line(2, b"garbage", JOURNALS[command])(world)
    assert run(command) == 2
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join([lines[0], *lines[2:]]))
    assert run(command) == 0
    assert {name: Path("out", name).read_bytes() for name in files("out") if name != JOURNALS[command]} == before
    assert "finished already" not in capsys.readouterr().err
    assert len(journal.read_bytes().splitlines()) == 4


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", ["bootstrap", "evaluate"])
def test_a_signal_ends_a_run_at_once_and_it_goes_on(command, signum, world, capsys, monkeypatch):
    append, batches = Journal.append, []

    def interrupted(journal, records):
        if batches:
            os.kill(os.getpid(), signum)
        append(journal, records)
        batches.append(records)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", interrupted)
        assert run(command) == 128 + signum
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == "bpo-fast: interrupted; the same command resumes where this one stopped."
    journal = Path("out", JOURNALS[command])
    assert files("out") == ["metadata.json", JOURNALS[command]]
    assert not [path for path in Path("out").iterdir() if path.name.startswith(".")]
    kept = journal.read_bytes()
    assert [json.loads(each)["left"] for each in kept.splitlines()] == [1, 0]
    assert run(command) == 0
    assert journal.read_bytes().startswith(kept)
    assert cli.main([command, "--config", "run.yaml", "--output_dir", "whole"]) == 0
    for name in LEFT[command]:
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(world, capsys, monkeypatch):
    from bpo_fast.runs import journal

    fsync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) == 3:  # after the settings and the first batch
            raise OSError(28, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "fsync", full)
        assert run("bootstrap") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "bpo-fast: error: out/parts/00000.jsonl: found that it cannot be written (No space left on device), expected "
        "room and permission for it; see to that and give the same command again, or choose another folder."
    )
    assert len(Path("out", JOURNAL).read_bytes().splitlines()) == 2
    assert run("bootstrap") == 0
    assert len(Path("out", JOURNAL).read_bytes().splitlines()) == 4
