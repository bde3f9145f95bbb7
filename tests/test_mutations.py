import pytest
from mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.error)
def test_a_mutation_is_still_of_this_source(mutation):
    # `python tests/mutations.py` runs them; here only that each still finds the line that it changes, and its test.
    assert (ROOT / mutation.file).read_text().count(mutation.fixed) == 1
    file, name = mutation.test.split("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text()
