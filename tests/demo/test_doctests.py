import doctest

from bpo_fast.demo import world


def test_examples():
    result = doctest.testmod(world)
    assert result.attempted > 0
    assert result.failed == 0
