"""Messages of a conversation in the one form that chat templates are given, and what is wrong with any other."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

Messages = list[dict[str, Any]]

ROLES = ("system", "user", "assistant", "tool")

# The placeholder of published data, which is no model's business once an image is a part of its message.
IMAGE_TAG = "<image>"


def structured(messages: str | Sequence[Mapping], name: str, *, num_images: int = 0) -> Messages:
    """Messages whose content is a list of parts.

    Args:
        messages: messages with text or parts as content, or one plain string: a user's where `name` is "prompt",
            otherwise an assistant's.
        name: what they are, for an error.
        num_images: images that the first user turn shows before its text where that is a plain string.

    Raises:
        ValueError: no messages, an unknown role, or a part that is neither text nor an image.

    Example:
        >>> structured("What is this?", "prompt", num_images=1)
        [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is this?'}]}]
    """
    if isinstance(messages, str):
        messages = [{"role": "user" if name == "prompt" else "assistant", "content": messages}]
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{name}: found {shorten(messages)}, expected a text or a list of messages.")
    result = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(f"{name}: found {shorten(message)}, expected a message of role and content.")
        # A data set's Arrow schema fills the keys that a message or part lacks with None; templates may trip over it.
        message = {key: value for key, value in message.items() if value is not None}
        role, content = message.get("role"), message.get("content", [])
        if role not in ROLES:
            raise ValueError(f"{name}: found a message of role {role!r}, expected one of {', '.join(ROLES)}.")
        if isinstance(content, str):
            images = [{"type": "image"}] * num_images if role == "user" else []
            num_images -= len(images)
            content = [*images, {"type": "text", "text": content}]
        if not isinstance(content, list | tuple):
            raise ValueError(f"{name}: found the content {shorten(content)}, expected a text or a list of parts.")
        result.append({**message, "content": [_part(part, name) for part in content]})
    return result


def check_content(messages: Messages, name: str, image_tags: Collection[str] = (IMAGE_TAG,)) -> None:
    """Refuse messages of `structured` that say nothing, or whose text holds an image's placeholder.

    A placeholder in a text has a model look for one image more than there is.

    Raises:
        ValueError: an empty message of a user or assistant, one of `image_tags` in a text.
    """
    for message in messages:
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        has_image = len(texts) < len(message["content"])
        if not (has_image or any(map(str.strip, texts)) or message["role"] == "system" or message.get("tool_calls")):
            raise ValueError(f"{name}: found an empty message of role {message['role']!r}, expected a text.")
        for tag in image_tags:
            if any(tag in text for text in texts):
                raise ValueError(
                    f"{name}: found {tag} in the text {shorten(' '.join(texts))}, expected none; an image is a part "
                    "{'type': 'image'} of a message."
                )


def shorten(value: object) -> str:
    """`repr`, cut for a message."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _part(part, name):
    part = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else part
    if isinstance(part, Mapping):
        if part.get("type") == "image":
            return part
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return part
    raise ValueError(
        f"{name}: found the part {shorten(part)}, expected {{'type': 'text', 'text': ...}} or {{'type': 'image'}}."
    )
