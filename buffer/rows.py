"""What a dataset row says of a rollout: its prompt, the images that belong to it, and its sampling."""

from collections.abc import Iterable, Mapping
from typing import Any

PROMPT_KEYS = ("prompt_ids", "prompt", "messages")
MEDIA_KEYS = ("media", "images")


def prompt_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `RolloutState` that a dataset row fills.

    A row is a mapping with `prompt` (text, or a list of chat messages), `messages`, or `prompt_ids`; `images` (or `media`) and
    `sampling` (overrides of the sampling parameters for this prompt) are optional, other columns travel in `row`.

    Raises:
        ValueError: the row is no mapping, has no prompt, or an empty one; its images are no list, or do not fit its messages.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"a dataset row must be a mapping with a prompt, not {type(row).__name__}: {row!r:.100}")
    present = [key for key in PROMPT_KEYS if row.get(key) is not None]
    if not present:
        raise ValueError(f"the row has no prompt: its columns are {sorted(map(str, row))}, and one of {PROMPT_KEYS} is needed")
    if empty := [key for key in present if hasattr(row[key], "__len__") and len(row[key]) == 0]:
        raise ValueError(f"the row's prompt is empty: {', '.join(empty)}")
    prompt, messages = row.get("prompt"), row.get("messages")
    fields: dict[str, Any] = {"prompt_ids": row.get("prompt_ids")}
    if isinstance(prompt, str):
        fields["prompt"], prompt = prompt, None
    chat = messages if prompt is None else prompt
    fields["messages"] = None if chat is None else _messages(chat)
    fields["media"] = images_of(fields["messages"], row)
    if row.get("sampling"):
        fields["sampling"] = dict(row["sampling"])
    return fields


def drawn_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """`messages` and `media` as the row gives them, lists of their own; nothing of a row without a prompt (a group made by hand)."""
    try:
        fields = prompt_fields(row)
    except (ValueError, TypeError):
        return {}
    return {"messages": fields["messages"], "media": fields["media"]}


def drawn_messages(row: Mapping[str, Any], messages: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Of `messages`, those of the prompt: as the row gives them, without the turns that a loop added; all, where the row gives none."""
    return drawn_fields(row).get("messages") or messages


def images_of(messages: Iterable[Any] | None, row: Mapping[str, Any]) -> list[Any] | None:
    """The images that a prompt speaks of, in its order; None where it has none and its row says nothing of any.

    They are the `image` of the messages' parts of type "image", of which one without has the next of the row's `images`. Where no
    message has such a part, they are the row's `images`.

    Raises:
        ValueError: `images` is no list, or has one more or less than the messages need.
    """
    given = _given_images(row)
    rest, found = list(given or ()), list[Any]()
    for part in (part for message in messages or () for part in parts_of(message) if part.get("type") == "image"):
        if part.get("image") is None and not rest:
            raise ValueError("a message speaks of an image that is not there; give it as part['image'], or in the row's images")
        found.append(rest.pop(0) if part.get("image") is None else part["image"])
    if rest and found:
        raise ValueError(f"{len(rest)} of the row's images belong to no part of its messages; give a part of type 'image' for each")
    return found or (None if given is None else rest)


def parts_of(message: Any) -> list[Mapping[str, Any]]:
    """The parts of a chat message; none where its content is text."""
    content = message.get("content") if isinstance(message, Mapping) else None
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list | tuple) else []


def _given_images(row: Mapping[str, Any]) -> list[Any] | None:
    given = [key for key in MEDIA_KEYS if row.get(key) is not None]
    if len(given) > 1:
        raise ValueError("the row has images and media, which are two names of one thing; give one of them")
    if not given:
        return None
    images = row[given[0]]
    if isinstance(images, str | bytes | Mapping) or not isinstance(images, Iterable):
        raise ValueError(f"{given[0]}={images!r:.60} is no list of images; give one, in the order of the prompt")
    return list(images)


def _messages(prompt: Any) -> list[dict[str, Any]]:
    messages = list(prompt) if isinstance(prompt, Iterable) else []
    if not messages or not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise ValueError(f"a prompt must be text or a list of chat messages with a role each, not {prompt!r:.100}")
    return [dict(message) for message in messages]
