import json
import resource

import pytest

from bpo_fast.runs.journal import Journal

RECORDS = [{"key": f"k{number}", "text": "é\n" * number} for number in range(5)]
FIELDS = {"text": str}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "responses.jsonl"


def write(path, batch_size=2):
    with Journal(path, FIELDS) as journal:
        missing = [record for record in RECORDS if record["key"] not in journal.records]
        for start in range(0, len(missing), batch_size):
            journal.append(missing[start : start + batch_size])
        return list(journal.records.values())


def test_records_are_found_by_key_and_a_whole_journal_is_not_touched(path):
    assert write(path) == RECORDS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [record | {"left": left} for record, left in zip(RECORDS, (1, 0, 1, 0, 0), strict=True)]
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert write(path) == RECORDS
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert not (path.parent / "none.jsonl").exists()
    assert Journal(path.parent / "none.jsonl", FIELDS).records == {}
    assert not (path.parent / "none.jsonl").exists()


def test_cut_at_any_byte_it_goes_on_with_whole_batches_and_ends_the_same(path):
    write(path)
    whole = path.read_bytes()
    ends = [0, *(number + 1 for number, byte in enumerate(whole) if byte == ord("\n"))]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        lines = sum(end <= cut for end in ends) - 1
        assert list(Journal(path, FIELDS).records.values()) == RECORDS[: lines // 2 * 2]
        assert path.read_bytes() == whole[:cut]  # reading changes nothing
        assert write(path) == RECORDS
        assert path.read_bytes() == whole


def test_zeros_at_the_end_are_what_a_power_failure_leaves(path):
    write(path)
    whole = path.read_bytes()
    first_batch = whole.index(b'{"key": "k2"')
    path.write_bytes(whole[:first_batch] + b"\0" * 300)
    assert write(path) == RECORDS
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        b"garbage",
        b"\xff\xfe{",
        b"[]",
        b"null",
        b"{}",
        b'{"key": "k1", "text": "A."}',
        b'{"key": "k1", "text": 1, "left": 0}',
        b'{"key": ["k1"], "text": "A.", "left": 0}',
        b'{"key": "k1", "text": "A.", "left": 0',
        b"[" * 100_000,
        b"",
    ],
)
def test_any_other_damage_is_named_and_nothing_is_dropped(path, line):
    write(path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"responses\.jsonl, line 2: found '.*, expected a record of key, tex"
    ) as error:
        Journal(path, FIELDS)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert path.read_bytes() == before
    # The remedy that is named: that record alone is made again, at the end.
    path.write_bytes(b"\n".join([lines[0], *lines[2:]]))
    assert write(path) == [RECORDS[0], *RECORDS[2:], RECORDS[1]]


def test_a_last_line_that_is_no_record_cut_off_is_named_too(path):
    write(path)
    path.write_bytes(path.read_bytes() + b"something else")
    with pytest.raises(ValueError, match=r"responses\.jsonl, line 6: found 'something else', expected a record"):
        Journal(path, FIELDS)


def test_text_that_no_file_takes_is_written_all_the_same(path):
    record = {"key": "a", "text": "half \ud83d of a pair"}
    with Journal(path, FIELDS) as journal:
        journal.append([record])
    assert Journal(path, FIELDS).records == {"a": record}


def test_a_full_disk_is_one_sentence_and_the_journal_stays_whole(path):
    whole = path.with_name("whole.jsonl")
    write(whole)
    with Journal(path, FIELDS) as journal:
        journal.append(RECORDS[:2])
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        try:
            with pytest.raises(
                OSError, match=r"responses\.jsonl: found that it cannot be written \(File too large\), "
            ):
                journal.append(RECORDS[2:4])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert write(path) == RECORDS
    assert path.read_bytes() == whole.read_bytes()


def test_an_interrupted_append_leaves_no_half_batch(path, monkeypatch):
    with Journal(path, FIELDS) as journal:
        journal.append(RECORDS[:2])
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                journal.append(RECORDS[2:4])
        assert path.read_bytes() == before
        assert list(journal.records) == ["k0", "k1"]
        journal.append(RECORDS[2:4])
    assert list(Journal(path, FIELDS).records.values()) == RECORDS[:4]
