"""`HTTPReward`: a reward model behind a server (the extra `http`)."""

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from agent_loop.arguments import at_least, function, instance, mapping, positive
from agent_loop.errors import RewardError, RewardTimeoutError
from agent_loop.rewards.batching import MicroBatcher
from agent_loop.rewards.wire import Wire, rollouts_wire
from buffer.codec import to_json
from buffer.rollout import RolloutState

try:
    import httpx
    import tenacity
except ImportError as error:
    raise ImportError("a reward over HTTP needs httpx and tenacity: pip install 'millrace[http]'") from error

_COME_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same request may well succeed."""

_ABOUT_THE_CONTENT = frozenset({400, 413, 422})
"""Statuses for which one rollout may be to blame, and the others of its batch not."""

_SHOWN = 200
"""Characters of an answer that errors show."""


class HTTPReward:
    """Asks a server for scores, several rollouts at a time; a reward of one rollout, open while its `async with` lasts.

    Connections that fail, answers that take too long, and the statuses 408, 425, 429, 500, 502, 503 and 504 are tried again after
    a pause, which is doubled each time, or as long as `Retry-After` says. Where the server refuses a batch for its content, or
    answers 500 to the end, each rollout is sent by itself, so that only those fail that are to blame. Redirects are not followed. Of
    the answer nothing is believed: its size is bounded, and it must hold one finite number for each rollout.
    """

    own_deadlines = True
    """Each attempt has one, and they are counted: `reward_timeout` is of plain rewards."""

    def __init__(
        self,
        url: str,
        *,
        wire: Wire | None = None,
        headers: Mapping[str, str] | None = None,
        batch: int = 16,
        window: float = 0.005,
        connections: int = 8,
        timeout: float = 20.0,
        attempts: int = 4,
        back_off: float = 0.25,
        longest_back_off: float = 10.0,
        max_answer: int = 1 << 20,
        client: Callable[[], httpx.AsyncClient] | None = None,
    ) -> None:
        """Say whom to ask, and how.

        Args:
            url: where requests are posted.
            wire: what they hold and what comes back; see `agent_loop.rewards.wire`. By default `rollouts_wire()`.
            headers: such as `{"Authorization": "Bearer ..."}`; never shown in errors.
            batch: rollouts of one request.
            window: seconds that the first rollout of a request waits for others.
            connections: requests at once.
            timeout: seconds for one attempt, from connecting to the last byte of the answer. In a `RewardSet` the
                deadline for all of them is that of the `RewardFunction`.
            attempts: at most so many, the first included.
            back_off: seconds before the second, doubled for each further one, with some chance in it.
            longest_back_off: seconds to which it grows, and of a `Retry-After` that is heeded.
            max_answer: bytes of an answer.
            client: makes the client, where you need proxies or certificates of your own; by default nothing of the environment is heeded.

        Raises:
            ValueError: a bound is crossed, or the URL is none.
        """
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, TypeError) as error:
            raise ValueError(f"url={url!r:.80} is no URL: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"url={url!r} must begin with http:// or https:// and name a host")
        for name, value in {"batch": batch, "connections": connections, "attempts": attempts, "max_answer": max_answer}.items():
            at_least(name, value, 1)
        for name, seconds in {"timeout": timeout, "back_off": back_off, "longest_back_off": longest_back_off}.items():
            positive(name, seconds)
        instance("wire", wire, Wire | None, "a Wire, such as rollouts_wire(), or None")
        if headers is not None:
            mapping("headers", headers, "names to texts")
        if client is not None:
            function("client", client, "one that makes an httpx.AsyncClient")
        self._url, self._wire, self._headers = parsed, wire or rollouts_wire(), dict(headers or {})
        self._place = f"{parsed.scheme}://{parsed.netloc.decode().rpartition('@')[2]}{parsed.path}"  # no password, no key in the query
        self._timeout, self._attempts, self._connections, self._max_answer = timeout, attempts, connections, max_answer
        self._pauses = tenacity.wait_random_exponential(multiplier=back_off, max=longest_back_off)
        self._longest_pause = longest_back_off
        self.at_once = batch * connections
        self._make_client = client or self._plain_client
        self._batches = MicroBatcher[RolloutState, float](self._scores, most=batch, window=window, at_once=connections)
        self._opened = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._batches.check_closed()
        async with AsyncExitStack() as opening:
            self._client = await opening.enter_async_context(self._make_client())
            await opening.enter_async_context(self._batches)
            self._opened = opening.pop_all()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._opened.__aexit__(kind, error, trace)

    def _plain_client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=self._connections, max_keepalive_connections=self._connections)
        # Nothing but what was asked for: no proxy and no password file of the environment.
        return httpx.AsyncClient(limits=limits, timeout=self._timeout, trust_env=False)

    async def __call__(self, rollout: RolloutState) -> float:
        """The server's score.

        Raises:
            RewardError: the server refused, gave no score, or all attempts failed.
        """
        return await self._batches(rollout)

    async def _scores(self, rollouts: list[RolloutState]) -> Sequence[float | Exception]:
        try:
            return await self._asked(rollouts, self._attempts)
        except _RefusedError:
            if len(rollouts) == 1:
                raise
        return [await self._alone(rollout) for rollout in rollouts]

    async def _alone(self, rollout: RolloutState) -> float | Exception:
        try:
            (score,) = await self._asked([rollout], 1)
        except RewardError as error:
            return error
        return score

    async def _asked(self, rollouts: list[RolloutState], most: int) -> list[float]:
        content = self._body(rollouts)
        attempts = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(most),
            retry=tenacity.retry_if_exception_type(_TryAgainError),
            wait=self._pause,
            reraise=True,
        )
        try:
            answer: bytes = await attempts(self._posted, content)
        except _TryAgainError as error:
            kind = _RefusedError if error.of_content else RewardTimeoutError if error.late else RewardError
            raise kind(f"{self._place} {error}" + (f", {most} times in a row" if most > 1 else "")) from error
        return self._decoded(answer, len(rollouts))

    def _body(self, rollouts: list[RolloutState]) -> bytes:
        try:
            return to_json(self._wire.encode(rollouts), "the request").encode()
        except Exception as error:
            raise _RefusedError(f"no request can be made of it: {type(error).__name__}: {error}") from error

    def _pause(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.after if isinstance(error, _TryAgainError) else None
        return min(asked, self._longest_pause) if asked is not None else self._pauses(state)

    async def _posted(self, content: bytes) -> bytes:
        """One attempt: the bytes of an answer with status 200."""
        try:
            # Of the whole: a server that sends a byte now and then would never exceed httpx's own, which are of single reads.
            async with asyncio.timeout(self._timeout):
                headers = {**self._headers, "Content-Type": "application/json", "Accept-Encoding": "identity"}
                asking = self._client.stream("POST", self._url, content=content, headers=headers, follow_redirects=False)
                async with asking as response:
                    return self._checked(response, await self._read(response))
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _TryAgainError(f"gave no answer within {self._timeout:g} s", late=True) from error
        except httpx.TransportError as error:
            raise _TryAgainError(f"could not be asked ({type(error).__name__}: {error})") from error

    async def _read(self, response: httpx.Response) -> bytes:
        body = bytearray()
        async for chunk in response.aiter_raw():  # as sent: a small answer that unpacks to gigabytes is not unpacked
            body += chunk
            if len(body) > self._max_answer:
                raise RewardError(f"{self._place} gave an answer of more than max_answer={self._max_answer} bytes")
        return bytes(body)

    def _checked(self, response: httpx.Response, body: bytes) -> bytes:
        shown = body[:_SHOWN].decode(errors="backslashreplace")
        if response.status_code in _COME_AGAIN:
            after = _seconds(response.headers.get("Retry-After"))
            raise _TryAgainError(f"answered {response.status_code}: {shown}", after, of_content=response.status_code == 500)
        if response.status_code in _ABOUT_THE_CONTENT:
            raise _RefusedError(f"{self._place} refused it with {response.status_code}: {shown}")
        if response.status_code != 200:
            raise RewardError(f"{self._place} answered {response.status_code}: {shown}")
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise RewardError(f"{self._place} gave an answer in {encoding}, which was not asked for")
        return body

    def _decoded(self, body: bytes, n: int) -> list[float]:
        try:
            scores = self._wire.decode(json.loads(body), n)
            if len(scores) != n:
                raise ValueError(f"it holds {len(scores)} scores for {n} rollouts")
            return [_finite(score) for score in scores]
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            shown = body[:_SHOWN].decode(errors="backslashreplace")
            raise RewardError(f"{self._place} gave an answer that is none: {error} ({shown})") from error


class _TryAgainError(Exception):
    """An attempt failed in a way that may pass.

    Attributes:
        after: seconds that the server asks to wait.
        of_content: whether it may not pass: what was sent may have made the server fail.
        late: whether it took too long.
    """

    def __init__(self, message: str, after: float | None = None, *, of_content: bool = False, late: bool = False) -> None:
        super().__init__(message)
        self.after, self.of_content, self.late = after, of_content, late


class _RefusedError(RewardError):
    """Of a batch: one of its rollouts may be to blame."""


def _seconds(header: str | None) -> float | None:
    """Of a `Retry-After` in seconds; None for a date, whose clock may be wrong."""
    try:
        seconds = math.nan if header is None else float(header)
    except ValueError:
        return None
    return seconds if seconds >= 0 else None


def _finite(score: Any) -> float:
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"{score!r:.40} is no finite number")
    return float(score)
