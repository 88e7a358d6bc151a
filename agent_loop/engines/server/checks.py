"""The arguments of `VLLMServerEngine`, checked: each with its value, its bound and what to do."""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from agent_loop.engines.server.client import server_url
from agent_loop.errors import RequestRefusedError
from agent_loop.sampling import whole


def checked_urls(urls: str | Iterable[str]) -> list[str]:
    """The addresses of servers, or `ValueError`."""
    listed = [server_url(url) for url in (urls if isinstance(urls, Iterable) and not isinstance(urls, str) else [urls])]
    if not listed:
        raise ValueError("urls is empty; give the address of one vLLM server or more, such as 'http://127.0.0.1:8000'")
    if len(set(listed)) < len(listed):
        raise ValueError(f"urls={listed} holds an address twice")
    return listed


def checked_ends(eos_token_ids: Collection[int] | None) -> frozenset[int] | None:
    """Token ids, or `ValueError`."""
    if eos_token_ids is None:
        return None
    if not isinstance(eos_token_ids, Iterable):
        raise ValueError(f"{eos_token_ids=} must be a collection of token ids, or None to ask the server")
    return frozenset(whole("a token of eos_token_ids", token) for token in eos_token_ids)


def check_structure(asked: Mapping[str, Any] | None) -> None:
    """Raise `RequestRefusedError` for a structure that cannot be sent."""
    try:
        json.dumps(None if asked is None else dict(asked), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestRefusedError(f"structured_outputs={asked!r:.120} must be made of what JSON has, to be sent: {error}") from None
