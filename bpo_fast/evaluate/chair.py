"""Object hallucination of descriptions, as CHAIR and Object HalBench count it.

An object counts once a response, however often and by whatever synonym it is named. With H the hallucinated objects
(named and not in the image) and M all named ones,

    response rate = responses with any H / responses with any M        (Object HalBench, "response")
    object rate   = sum of |H| / sum of |M|                            (CHAIR_i, "object")

(Rohrbach et al., arXiv 1809.02156; Object HalBench as in RLHF-V, arXiv 2312.00849.) Objects are found by word
matching against a synonym table; nothing is inferred from grammar, so "no dog" names a dog.
"""

import re
from collections.abc import Collection, Mapping, Sequence


class ObjectMatcher:
    """Find the objects that a text names.

    Args:
        synonyms: object -> the words or phrases that mean it, every inflected form listed. Where phrases overlap in a
            text the longest one counts: a "hot dog" is not a dog.

    Raises:
        ValueError: the table is empty or no table, an object has no phrase or an empty one, or two objects share one.

    Example:

    >>> matcher = ObjectMatcher({"dog": ["dog", "dogs"], "hot dog": ["hot dog"]})
    >>> sorted(matcher("Two Dogs, one hot dog."))
    ['dog', 'hot dog']
    >>> matcher("A hotdog stand.")
    set()
    """

    def __init__(self, synonyms: Mapping[str, Collection[str]]):
        if not isinstance(synonyms, Mapping) or not synonyms:
            raise ValueError(f"synonyms: found {synonyms!r:.80}, expected a table of at least one object.")
        self._object_of = {}
        for item, phrases in synonyms.items():
            if not isinstance(item, str) or not item.strip():
                raise ValueError(f"synonyms: found the object {item!r:.80}, expected its name.")
            if not isinstance(phrases, list | tuple | set | frozenset) or not phrases:
                raise ValueError(
                    f"synonyms: found {phrases!r:.80} for '{item}', expected a list of at least one phrase."
                )
            for phrase in phrases:
                # An empty phrase would be found in every text.
                if not isinstance(phrase, str) or not phrase.strip():
                    raise ValueError(f"synonyms: found the phrase {phrase!r:.80} for '{item}', expected words.")
                key = " ".join(phrase.lower().split())
                other = self._object_of.setdefault(key, item)
                if other != item:
                    raise ValueError(f"synonyms: found '{key}' for both '{other}' and '{item}', expected it for one.")
        longest_first = sorted(self._object_of, key=len, reverse=True)
        spaced = (r"\s+".join(map(re.escape, phrase.split())) for phrase in longest_first)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(spaced)})(?!\w)")

    def __call__(self, text: str) -> set[str]:
        found = self._pattern.findall(text.lower())
        return {self._object_of[" ".join(phrase.split())] for phrase in found}


def check_objects(objects: Sequence[Collection[str]], synonyms: Mapping[str, Collection[str]]) -> None:
    """Refuse a faulty synonym table, or true objects that are not in it; arguments as those of `score_chair`.

    Raises:
        ValueError: see `ObjectMatcher`, an image's objects are not a list, or one of them is not in the table.
    """
    ObjectMatcher(synonyms)
    for number, names in enumerate(objects):
        if not isinstance(names, list | tuple | set | frozenset):
            raise ValueError(f"objects, record {number}: found {names!r:.80}, expected a list of names.")
        for item in names:
            if not isinstance(item, str) or item not in synonyms:
                raise ValueError(
                    f"objects, record {number}: found {item!r:.80}, expected objects of the synonym table; add it "
                    "there."
                )


def score_chair(
    responses: Sequence[str], objects: Sequence[Collection[str]], synonyms: Mapping[str, Collection[str]]
) -> dict:
    """Hallucination rates of descriptions.

    Args:
        responses: N descriptions.
        objects: for each, the names (keys of `synonyms`) of the objects that are truly in its image.
        synonyms: see `ObjectMatcher`.

    Returns:
        `response_rate` and `object_rate` (fractions; 0 where no object is named), the counts they are made of, and
        `hallucinated`: for each response the sorted names of the objects it made up.

    Raises:
        ValueError: lengths differ, or a true object is not in the table.

    Example:

    >>> table = {"cat": ["cat", "kitten"], "dog": ["dog"], "cup": ["cup"]}
    >>> score = score_chair(["A kitten and a cat.", "A cat and a dog.", "Nothing."], [["cat"], ["cat"], []], table)
    >>> score["response_rate"], score["object_rate"], score["hallucinated"]
    (0.5, 0.3333333333333333, [[], ['dog'], []])
    """
    if len(responses) != len(objects):
        raise ValueError(f"objects: found {len(objects)} lists for {len(responses)} responses, expected as many.")
    check_objects(objects, synonyms)
    matcher = ObjectMatcher(synonyms)
    named = [matcher(response) for response in responses]
    made_up = [names - set(true) for names, true in zip(named, objects, strict=True)]
    counts = {
        "num_responses": len(responses),
        "num_responses_with_objects": sum(map(bool, named)),
        "num_hallucinated_responses": sum(map(bool, made_up)),
        "num_objects": sum(map(len, named)),
        "num_hallucinated_objects": sum(map(len, made_up)),
    }
    return {
        "response_rate": counts["num_hallucinated_responses"] / max(counts["num_responses_with_objects"], 1),
        "object_rate": counts["num_hallucinated_objects"] / max(counts["num_objects"], 1),
        **counts,
        "hallucinated": [sorted(names) for names in made_up],
    }
