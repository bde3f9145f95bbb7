import hashlib
from dataclasses import dataclass

from bpo_fast.runs.fingerprint import fingerprint


@dataclass
class Pair:
    b: int
    a: tuple


def test_it_is_the_sha256_of_one_line_of_json_a_value():
    lines = b'{"a": [1, 2], "b": 1}\n"\\u00e9"\nnull\n0.5\n'
    expected = "sha256:" + hashlib.sha256(lines).hexdigest()
    assert fingerprint([{"b": 1, "a": [1, 2]}, "é", None, 0.5]) == expected
    assert fingerprint(iter([Pair(1, (1, 2)), "é", None, 0.5])) == expected


def test_values_are_told_apart_by_order_and_by_where_one_ends():
    prints = [fingerprint(values) for values in ([1, 2], [2, 1], [12], [[1, 2]], [], [{"a": 1}], [{"a": "1"}])]
    assert len(set(prints)) == len(prints)


def test_a_stream_is_taken_one_value_at_a_time():
    alive = []

    class Batch(dict):
        def __init__(self, **items):
            super().__init__(**items)
            alive.append(1)

        def __del__(self):
            alive.pop()

    def stream():
        for number in range(5):
            yield Batch(number=number)
            most.append(len(alive))

    most = []
    assert fingerprint(stream()) == fingerprint([{"number": number} for number in range(5)])
    assert max(most) <= 2
