import pytest

from bpo_fast.evaluate.chair import ObjectMatcher, score_chair

TABLE = {
    "dog": ["dog", "dogs", "puppy"],
    "hot dog": ["hot dog", "hot dogs"],
    "cat": ["cat", "cats"],
    "red circle": ["red circle", "red circles"],
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A DOG and two puppies, one puppy.", {"dog"}),
        ("A hot dog.", {"hot dog"}),
        ("A hot dog and a dog.", {"hot dog", "dog"}),
        ("A hot  dog\nwith two red\tcircles", {"hot dog", "red circle"}),
        ("A category of doggerel, a red semicircle.", set()),
        ("cat-like (cats!)", {"cat"}),
        ("", set()),
    ],
)
def test_matcher(text, expected):
    assert ObjectMatcher(TABLE)(text) == expected


def test_punctuation_in_a_phrase_is_taken_literally():
    assert ObjectMatcher({"x": ["a.b"]})("acb") == set()
    assert ObjectMatcher({"x": ["a.b"]})("an a.b!") == {"x"}


def test_score_by_hand():
    responses = [
        "A dog, a puppy and a cat.",  # names dog once and cat; cat made up
        "Two dogs.",  # right
        "Nothing to see.",  # names nothing, so it is in no denominator
        "A hot dog, a cat and a red circle.",  # all three made up
    ]
    objects = [["dog"], ["dog", "cat"], ["dog"], ["dog"]]
    score = score_chair(responses, objects, TABLE)
    assert score["num_responses"] == 4
    assert score["num_responses_with_objects"] == 3
    assert score["num_hallucinated_responses"] == 2
    assert score["num_objects"] == 2 + 1 + 0 + 3
    assert score["num_hallucinated_objects"] == 1 + 3
    assert score["response_rate"] == pytest.approx(2 / 3)
    assert score["object_rate"] == pytest.approx(4 / 6)
    assert score["hallucinated"] == [["cat"], [], [], ["cat", "hot dog", "red circle"]]


def test_no_object_named_anywhere_is_no_hallucination():
    score = score_chair(["Nothing."], [["dog"]], TABLE)
    assert (score["response_rate"], score["object_rate"]) == (0, 0)


@pytest.mark.parametrize(
    ("responses", "objects", "table", "sentence"),
    [
        (["a"], [], TABLE, "objects: found 0 lists for 1 responses"),
        (["a"], [["elk"]], TABLE, "objects, record 0: found 'elk', expected objects of the synonym table"),
        (["a", "b"], [["dog"], "dog"], TABLE, "objects, record 1: found 'dog', expected a list of names"),
        (["a"], [None], TABLE, "objects, record 0: found None, expected a list of names"),
        (["a"], [[["dog"]]], TABLE, r"objects, record 0: found \['dog'\], expected objects of the synonym table"),
        (["a"], [[3]], TABLE, "objects, record 0: found 3, expected objects of the synonym table"),
        (["a"], [[]], {"dog": ["dog", ""]}, "synonyms: found the phrase '' for 'dog', expected words"),
        (["a"], [[]], {"dog": ["dog", " \n"]}, r"synonyms: found the phrase ' \\n' for 'dog', expected words"),
        (["a"], [[]], {"dog": [["dog"]]}, r"synonyms: found the phrase \['dog'\] for 'dog', expected words"),
        (["a"], [[]], {"dog": [3]}, "synonyms: found the phrase 3 for 'dog', expected words"),
        (["a"], [[]], {"dog": {"dog": 1}}, r"synonyms: found {'dog': 1} for 'dog', expected a list"),
        (["a"], [[]], {"dog": 3}, "synonyms: found 3 for 'dog', expected a list"),
        (["a"], [[]], {"": ["dog"]}, "synonyms: found the object '', expected its name"),
        (["a"], [[]], {3: ["dog"]}, "synonyms: found the object 3, expected its name"),
        (["a"], [[]], {}, "synonyms: found {}, expected a table of at least one object"),
        (["a"], [[]], ["dog"], "synonyms: found .'dog'., expected a table"),
        (["a"], [[]], {"dog": "dog"}, "synonyms: found 'dog' for 'dog', expected a list"),
        (["a"], [[]], {"dog": []}, "expected a list of at least one phrase"),
        (
            ["a"],
            [[]],
            {"dog": ["pet"], "cat": ["Pet"]},
            "synonyms: found 'pet' for both 'dog' and 'cat', expected it for one",
        ),
    ],
)
def test_mistakes_are_one_sentence(responses, objects, table, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        score_chair(responses, objects, table)
    assert "\n" not in str(error.value)
