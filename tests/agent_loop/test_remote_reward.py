"""A reward model behind HTTP: batches, retries, bounds and distrust, against a real server on the loopback."""

import asyncio
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest

from agent_loop import RewardFunction, RewardSet
from agent_loop.errors import RewardClosedError, RewardError
from agent_loop.rewards.remote import HTTPReward
from agent_loop.rewards.wire import Wire, openrlhf_wire, vllm_wire
from tests.agent_loop.judged import answer, rollout, serving

CHAT = [{"role": "user", "content": "2 + 2?"}]


async def all_of(reward: HTTPReward, rollouts: list[Any]) -> list[Any]:
    """Asked at once; errors as values."""
    return await asyncio.gather(*map(reward, rollouts), return_exceptions=True)


async def lengths(request: dict[str, Any], writer: Any) -> bytes:
    return answer({"scores": [len(one["text"]) for one in request["body"]["rollouts"]]})


async def test_what_is_asked_together_goes_in_one_request_up_to_a_batch() -> None:
    sizes: list[int] = []

    async def counting(request: dict[str, Any], writer: Any) -> bytes:
        sizes.append(len(request["body"]["rollouts"]))
        return await lengths(request, writer)

    async with serving(counting) as url, HTTPReward(url, batch=4, window=0.05) as reward:
        texts = ["x" * n for n in range(10)]
        assert await all_of(reward, [rollout(n, text) for n, text in enumerate(texts)]) == [float(n) for n in range(10)]
        assert sorted(sizes) == [2, 4, 4]
        assert await reward(rollout(0, "alone")) == 5.0


async def test_the_server_sees_the_row_and_the_headers() -> None:
    seen: list[dict[str, Any]] = []

    async def handler(request: dict[str, Any], writer: Any) -> bytes:
        seen.append(request)
        return answer({"scores": [1]})

    async with serving(handler) as url, HTTPReward(url, headers={"Authorization": "Bearer abc"}) as reward:
        assert await reward(rollout(prompt=CHAT, answer="4")) == 1.0
    (one,) = seen[0]["body"]["rollouts"]
    assert (one["row"], one["messages"], one["text"], one["response_ids"]) == ({"prompt": CHAT, "answer": "4"}, CHAT, "four", [5, 6])
    assert "authorization: bearer abc" in seen[0]["head"]


@pytest.mark.parametrize(
    "failure",
    [
        answer({}, 429, Retry_After="0.01"),
        answer({}, 503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
        answer({}, 503),
        None,
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{",
        b"nonsense\r\n\r\n",
    ],
)
async def test_what_may_pass_is_tried_again(failure: bytes | None) -> None:
    calls = 0

    async def flaky(request: dict[str, Any], writer: Any) -> bytes | None:
        nonlocal calls
        calls += 1
        if calls < 3:
            writer.write(failure or b"")
            return None
        return await lengths(request, writer)

    async with serving(flaky) as url, HTTPReward(url, back_off=0.001, attempts=3) as reward:
        assert await reward(rollout()) == 4.0
    assert calls == 3


async def test_a_server_that_stays_away_or_too_slow_is_an_error_that_says_so() -> None:
    async def busy(request: dict[str, Any], writer: Any) -> bytes:
        return answer(b"overloaded", 503)

    async def dripping(request: dict[str, Any], writer: Any) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with serving(busy) as url, HTTPReward(url, back_off=0.001, attempts=2) as reward:
        with pytest.raises(RewardError, match=r"/score answered 503: overloaded, 2 times in a row"):
            await reward(rollout())
    async with HTTPReward(url, back_off=0.001, attempts=2) as reward:  # nobody listens any more
        with pytest.raises(RewardError, match=r"could not be asked \(ConnectError.*2 times in a row"):
            await reward(rollout())
    async with serving(dripping) as url, HTTPReward(url, back_off=0.001, attempts=2, timeout=0.05) as reward:
        with pytest.raises(RewardError, match=r"gave no answer within 0.05 s, 2 times"):
            await reward(rollout())


async def test_retry_after_is_heeded_within_its_bound() -> None:
    times: list[float] = []

    async def later(request: dict[str, Any], writer: Any) -> bytes:
        times.append(time.monotonic())
        return answer({}, 429, Retry_After="0.2" if len(times) == 1 else "9999") if len(times) < 3 else answer({"scores": [1]})

    async with serving(later) as url, HTTPReward(url, back_off=0.001, longest_back_off=0.3) as reward:
        assert await reward(rollout()) == 1.0
    assert times[1] - times[0] >= 0.2
    assert times[2] - times[1] >= 0.3


async def test_what_is_refused_fails_at_once_and_only_who_is_to_blame() -> None:
    requests: list[int] = []

    async def strict(request: dict[str, Any], writer: Any) -> bytes:
        rollouts = request["body"]["rollouts"]
        requests.append(len(rollouts))
        return answer(b"too long", 400) if any(len(one["text"]) > 3 for one in rollouts) else await lengths(request, writer)

    async with serving(strict) as url, HTTPReward(url, batch=4) as reward:
        scores = await all_of(reward, [rollout(0, "a"), rollout(1, "long one"), rollout(2, "bb"), rollout(3, "ccc")])
    assert [scores[0], scores[2], scores[3]] == [1.0, 2.0, 3.0]
    assert "refused it with 400: too long" in str(scores[1])
    assert sorted(requests) == [1, 1, 1, 1, 4]

    async def forbidden(request: dict[str, Any], writer: Any) -> bytes:
        requests.append(1)
        return answer(b"who are you?", 401)

    requests.clear()
    async with serving(forbidden) as url, HTTPReward(url.replace("//", "//me:secret@") + "?key=secret") as reward:
        with pytest.raises(RewardError, match="answered 401: who are you") as caught:
            await reward(rollout())
    assert "secret" not in str(caught.value)
    assert requests == [1]


async def test_one_that_makes_the_server_fail_does_not_fail_the_others() -> None:
    async def fragile(request: dict[str, Any], writer: Any) -> bytes:
        bad = any(one["text"] == "bad" for one in request["body"]["rollouts"])
        return answer(b"Traceback", 500) if bad else await lengths(request, writer)

    async with serving(fragile) as url, HTTPReward(url, back_off=0.001, attempts=2) as reward:
        scores = await all_of(reward, [rollout(0, "a"), rollout(1, "bad"), rollout(2, "bb")])
    assert [scores[0], scores[2]] == [1.0, 2.0]
    assert str(scores[1]).endswith("/score answered 500: Traceback")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"", "is none: Expecting value"),
        (b"<html>", "is none: Expecting value"),
        (b"[1]", "has no list 'scores'"),
        (b'{"scores": 1}', "has no list 'scores'"),
        (b'{"scores": []}', "holds 0 scores for 1 rollouts"),
        (b'{"scores": [1, 2]}', "holds 2 scores for 1 rollouts"),
        (b'{"scores": [NaN]}', "nan is no finite number"),
        (b'{"scores": [1e999]}', "inf is no finite number"),
        (b'{"scores": [null]}', "None is no finite number"),
        (b'{"scores": [true]}', "True is no finite number"),
        (b'{"scores": ["1"]}', "'1' is no finite number"),
        (b'{"scores": [' + b"9" * 400 + b"]}", "is none: int too large"),
        (b'{"scores": [' + b"9" * 5000 + b"]}", "is none: Exceeds the limit"),
        (b"[" * 200_000, "is none: maximum recursion depth"),
        (b"\xff\xfe\xff", "is none: "),
        (b" " * 400_000, "more than max_answer=300000 bytes"),
    ],
)
async def test_an_answer_is_not_believed(said: bytes, why: str) -> None:
    async def handler(request: dict[str, Any], writer: Any) -> bytes:
        return answer(said)

    async with serving(handler) as url, HTTPReward(url, max_answer=300_000) as reward:
        with pytest.raises(RewardError) as caught:
            await reward(rollout())
    assert why in str(caught.value)
    assert len(str(caught.value)) < 1200


async def test_neither_redirects_nor_packed_answers_are_followed() -> None:
    answers = [answer({}, 302, Location="http://127.0.0.1:9/"), answer(b"\x1f\x8b", Content_Encoding="gzip")]

    async def handler(request: dict[str, Any], writer: Any) -> bytes:
        assert "accept-encoding: identity" in request["head"]
        return answers.pop(0)

    async with serving(handler) as url, HTTPReward(url) as reward:
        for why in ("answered 302", "gave an answer in gzip, which was not asked for"):
            with pytest.raises(RewardError, match=why):
                await reward(rollout())


def test_turns_that_a_loop_added_are_no_part_of_the_prompt() -> None:
    turns = rollout(prompt=CHAT)
    assert turns.messages is not None
    turns.messages += [{"role": "assistant", "content": "calc"}, {"role": "tool", "content": "4"}]
    sent = openrlhf_wire(render=lambda one: str(one.text)).encode([rollout(prompt=CHAT), turns])
    assert sent["prompts"] == [CHAT, CHAT]


async def test_the_wires_speak_as_openrlhf_and_vllm_do() -> None:
    seen: list[Any] = []

    async def openrlhf(request: dict[str, Any], writer: Any) -> bytes:
        seen.append(request["body"])
        return answer({"rewards": [0.5], "scores": [9], "extra_logs": {}})

    async def vllm(request: dict[str, Any], writer: Any) -> bytes:
        seen.append(request["body"])
        n = len(request["body"]["input"])
        entries = [{"index": place, "label": "good", "probs": [0.1, place / 10], "num_classes": 2} for place in range(n)]
        return answer({"object": "list", "data": entries[::-1]})

    async with serving(openrlhf) as url, HTTPReward(url, wire=openrlhf_wire(label="answer")) as reward:
        assert await reward(rollout(answer="4")) == 0.5
        with pytest.raises(RewardError, match=r"the prompt is a chat; pass render="):
            await reward(rollout(prompt=CHAT))
    async with serving(vllm) as url, HTTPReward(url, wire=vllm_wire("rm", label=1, options={"use_activation": False})) as reward:
        assert await all_of(reward, [rollout(0), rollout(1, " x")]) == [0.0, 0.1]
        assert "the rollout has no text" in str((await all_of(reward, [rollout(2, None)]))[0])
    assert seen[0] == {"query": ["2 + 2 =four"], "prompts": ["2 + 2 ="], "labels": ["4"]}
    assert seen[1] == {"model": "rm", "input": ["2 + 2 =four", "2 + 2 = x"], "use_activation": False}
    answers = [
        [{"index": 0, "probs": [1]}, {"index": 0, "probs": [2]}],
        [{"index": 1, "data": [1]}],
        [{"index": 0}],
        [3],
        [{"index": 0, "probs": []}],
    ]

    async def wrong(request: dict[str, Any], writer: Any) -> bytes:
        return answer({"data": answers.pop()})

    async with serving(wrong) as url, HTTPReward(url, wire=vllm_wire("rm")) as reward:
        while answers:
            with pytest.raises(RewardError, match="gave an answer that is none"):
                await reward(rollout())


async def test_a_client_of_ones_own_is_used_and_closed() -> None:
    made = httpx.AsyncClient(follow_redirects=True, headers={"X-Team": "blue"})

    async def handler(request: dict[str, Any], writer: Any) -> bytes:
        return answer({"scores": [1]}) if "x-team: blue" in request["head"] else answer({}, 403)

    async with serving(handler) as url, HTTPReward(url, client=lambda: made) as reward:
        assert await reward(rollout()) == 1.0
    assert made.is_closed


async def test_a_row_that_makes_no_request_fails_alone() -> None:
    wire = Wire(
        lambda rollouts: {"rollouts": [{"text": one.text, "answer": one.row["answer"]} for one in rollouts]}, lambda said, n: said["scores"]
    )
    async with serving(lengths) as url, HTTPReward(url, wire=wire) as reward:
        scores = await all_of(reward, [rollout(0, "a", answer=1), rollout(1, "b"), rollout(2, "c", answer=object())])
    assert scores[0] == 1.0
    assert "no request can be made of it: KeyError: 'answer'" in str(scores[1])
    assert "the request cannot be stored" in str(scores[2])


async def test_cancelled_or_closed_in_mid_request_nobody_hangs_and_nothing_is_left() -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def hanging(request: dict[str, Any], writer: Any) -> None:
        asked.set()
        await gone.wait()

    async with serving(hanging) as url:
        before = asyncio.all_tasks()
        async with HTTPReward(url, timeout=600) as reward, asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(reward(rollout(n))) for n in range(3)]
            await asked.wait()
            for call in calls:
                call.cancel()
        assert {task for task in asyncio.all_tasks() - before if "connected" not in repr(task)} == set()
        asked.clear()
        async with asyncio.TaskGroup() as tasks:
            async with HTTPReward(url, timeout=600) as reward:
                call = tasks.create_task(asyncio.wait_for(_told(reward), 60))
                await asked.wait()
            assert "was closed before it had an answer" in str(await call)
        gone.set()
    with pytest.raises(RewardClosedError, match="it is not open; use it"):
        await reward(rollout())


async def _told(reward: HTTPReward) -> Any:
    try:
        return await reward(rollout())
    except RewardError as error:
        return error


async def test_a_set_opens_and_closes_it_and_judges_by_it() -> None:
    async with serving(lengths) as url:
        async with RewardSet({"length": RewardFunction(HTTPReward(url), timeout=30)}) as rewards:
            assert (await rewards(rollout(0, "seven"))).score == 5.0
        with pytest.raises(RewardError, match="reward length: it is not open"):
            await rewards(rollout(1))
        async with rewards:
            assert (await rewards(rollout(2, "again"))).score == 5.0
            with pytest.raises(RuntimeError, match="it is open already; open either the reward or the RewardSet"):
                async with rewards:
                    raise AssertionError
            assert (await rewards(rollout(3, "on"))).score == 2.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "ftp://host/"}, "must begin with http"),
        ({"url": "http:///score"}, "name a host"),
        ({"url": "http://[::1"}, "is no URL"),
        ({"url": None}, "is no URL"),
    ],
)
def test_a_url_that_is_none_is_refused(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HTTPReward(**{"url": "http://localhost/score", **options})


def test_without_its_libraries_the_extra_is_named() -> None:
    check = "import sys; sys.modules['tenacity'] = None\nimport agent_loop.rewards.remote"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=False)
    assert "pip install 'millrace[http]'" in done.stderr
