import json

import pytest

from bpo_fast.runs.journal import Journal

RECORDS = [{"record": number, "text": "é\n" * number} for number in range(5)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "responses.jsonl"


def write(path, batch_size=2):
    with Journal(path, batch_size, len(RECORDS)) as journal:
        for start in range(len(journal.records), len(RECORDS), batch_size):
            journal.append(RECORDS[start : start + batch_size])
        return journal.records


def test_a_finished_journal_is_kept_whole(path):
    assert write(path) == RECORDS
    before = path.read_bytes()
    with Journal(path, 2, len(RECORDS)) as journal:
        assert journal.records == RECORDS
    assert path.read_bytes() == before


def test_cut_at_any_byte_it_goes_on_with_whole_batches_and_ends_the_same(path):
    write(path)
    whole = path.read_bytes()
    ends = [0]
    for record in RECORDS:
        ends.append(ends[-1] + len(json.dumps(record, ensure_ascii=False).encode()) + 1)
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(path, 2, len(RECORDS)) as journal:
            lines = sum(end <= cut for end in ends) - 1
            assert journal.records == RECORDS[: lines // 2 * 2]
        assert write(path) == RECORDS
        assert path.read_bytes() == whole


def test_a_second_writer_is_refused(path):
    with (
        Journal(path, 2, 5),
        pytest.raises(ValueError, match=r"responses\.jsonl: found another process writing it, expected"),
    ):
        Journal(path, 2, 5)
    write(path)
