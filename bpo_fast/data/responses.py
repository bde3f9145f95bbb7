"""What no response may be, annotated or made: empty, with an image's placeholder in it, or too long."""

from collections.abc import Callable

from bpo_fast.models.conversation import IMAGE_TAG


def _empty(response: str, max_words: int | None) -> str | None:
    return None if response.strip() else "an empty response"


def _image_tag(response: str, max_words: int | None) -> str | None:
    return f"{IMAGE_TAG} in the answer" if IMAGE_TAG in response else None


def _too_long(response: str, max_words: int | None) -> str | None:
    words = len(response.split())
    if max_words is None or words <= max_words:
        return None
    return f"a response of {words} words, over max_response_words={max_words}"


# A name to count by -> what finds the fault in a response, given the most words that it may have (None: any number).
FAULTS: dict[str, Callable[[str, int | None], str | None]] = {
    "empty": _empty,
    "image_tag": _image_tag,
    "too_long": _too_long,
}
