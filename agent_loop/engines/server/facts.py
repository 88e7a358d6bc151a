"""What a server serves: its model's name, length, vocabulary and ends, and whether it has what `VLLMServerEngine` needs."""

import asyncio
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from agent_loop.engines.server.answers import read_whole
from agent_loop.engines.server.client import Server, look_body
from agent_loop.engines.server.faults import NoSuchEndpoint, ReplicaError
from agent_loop.errors import EngineError, RequestRefusedError

OLDEST = (0, 32)
NOBODY = "millrace:no-such-adapter"

DEV_MODE = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"
SCALE_OUT = "start it with --enable-scale-out"
LOGPROBS = "start it with --logprobs-mode processed_logprobs"
WORKER = "agent_loop.engines.server.worker.WorkerExtension"


@dataclass(frozen=True)
class Facts:
    """What all replicas must have in common, and how this one loads weights.

    Attributes:
        model: the name under which it is served.
        root: where it was loaded from.
        tied: whether its output matrix is its input embedding.
        extended: whether its workers have our extension.
        adapters: whether it takes adapters while it runs.
        tokenizer: whether it has one, which structured outputs need.
        images: whether its model sees, as our extension says.
        sleep: whether it can sleep, as our extension says.
    """

    model: str
    root: str
    max_length: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    tied: bool
    extended: bool = False
    adapters: bool = False
    tokenizer: bool = False
    images: bool = False
    sleep: bool = False

    def check_same(self, other: "Facts", url: str, other_url: str) -> None:
        """Raise `EngineError` if two replicas do not serve the same."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs and field.name != "extended":
                raise EngineError(
                    f"{url} and {other_url} serve different models: {field.name} is {_shown(mine)} and {_shown(theirs)}; "
                    "replicas of one engine serve one model with the same arguments"
                )


def _shown(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset) else repr(value)


async def facts_of(server: Server, *, vocab_size: int | None, eos_token_ids: Collection[int] | None) -> Facts:
    """What the server serves; what is given is not asked for.

    Raises:
        EngineError: it is no vLLM, too old, or was started without what is needed, with the remedy.
        ReplicaError: it does not answer.
    """
    version = await server.version()
    if (found := re.match(r"(\d+)\.(\d+)", version)) and (0, 0) < (int(found[1]), int(found[2])) < OLDEST:
        raise EngineError(f"{server.url} runs vLLM {version}; use {OLDEST[0]}.{OLDEST[1]} or newer")
    base = next((model for model in await server.models() if model.get("parent") is None), {})
    name, root, max_length = base.get("id"), base.get("root"), base.get("max_model_len")
    if not isinstance(name, str) or not isinstance(root, str) or type(max_length) is not int or max_length < 2:
        raise EngineError(f"{server.url} lists no model with its length, but {base!r:.200}; is it a vLLM server of a generative model?")
    config = await asyncio.to_thread(config_in, Path(root)) or await _config_told(server)
    text = _mapping(config.get("text_config")) or config
    vocab = vocab_size if vocab_size is not None else text.get("vocab_size")
    ends = eos_token_ids if eos_token_ids is not None else _ids(_end_of(config, text), server.url)
    if type(vocab) is not int or vocab < 1:
        raise EngineError(f"{server.url} does not tell the size of its vocabulary ({vocab!r:.50}); give vocab_size")
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", True)))
    facts = Facts(name, root, max_length, vocab, frozenset(ends), tied)
    await check_endpoints(server, facts)
    facts = replace(facts, extended=await _extended(server, tied))
    if facts.extended:
        sees, sleeps = set(await server.rpc("sees_images")), set(await server.rpc("can_sleep"))
        facts = replace(facts, images=sees == {"True"}, sleep=sleeps == {"True"})
    facts = replace(facts, tokenizer=await _has_tokenizer(server, facts))
    return replace(facts, adapters=await _takes_adapters(server, facts))


def _end_of(config: dict[str, Any], text: dict[str, Any]) -> Any:
    return text.get("eos_token_id") if config.get("eos_token_id") is None else config["eos_token_id"]


async def check_endpoints(server: Server, facts: Facts) -> None:
    """Raise `EngineError` unless the server has the endpoints, and gives log-probabilities of the sampling distribution."""
    try:
        paused, label = await server.is_paused(), await server.label()
    except NoSuchEndpoint as error:
        raise EngineError(f"{server.url} has no development endpoints; {DEV_MODE} ({error})") from error
    if paused:
        raise ReplicaError(f"{server.url} is paused")  # it would not answer
    # One token is left to sample, so that the log-probability of the sampling distribution is 0, and no other one is.
    prompt = [facts.vocab_size // part for part in (3, 2, 5)]  # no padding, after which all tokens may be equally likely
    body = look_body(facts.model, prompt, likely_tokens=1, salt=label, temperature=1.0, top_k=1)
    try:
        entry, _ = read_whole(await server.ask(body, seconds=server.load_seconds), facts.vocab_size)
    except NoSuchEndpoint as error:
        raise EngineError(f"{server.url} does not take token ids; {SCALE_OUT} ({error})") from error
    except RequestRefusedError as error:
        raise EngineError(
            f"{server.url} refused a request for one token; is it vLLM {OLDEST[0]}.{OLDEST[1]} or newer? ({error})"
        ) from error
    if abs(entry.logprob) > 1e-4:
        raise EngineError(
            f"{server.url} gives log-probabilities before sampling parameters ({entry.logprob:.3g} where 0 is right); {LOGPROBS}"
        )


async def _extended(server: Server, tied: bool) -> bool:
    """Whether the server's workers have our extension; refused where new weights would be wrong without."""
    try:
        await server.rpc("sees_folder", "/")
        return True
    except (ReplicaError, EngineError):
        if tied and await _device(server) == "cpu":
            raise EngineError(
                f"{server.url} runs on a CPU and its model has tied embeddings, of which vLLM's reload would leave the output "
                f"matrix as it was; start it with --worker-extension-cls {WORKER}"
            ) from None
        return False


async def _has_tokenizer(server: Server, facts: Facts) -> bool:
    body = look_body(facts.model, [facts.vocab_size // 3], likely_tokens=1, salt=NOBODY, logprobs=None, detokenize=True)
    try:
        await server.ask(body | {"output_mode": "text"}, seconds=server.load_seconds)
    except RequestRefusedError:
        return False
    return True


async def _takes_adapters(server: Server, facts: Facts) -> bool:
    """Whether it can be given adapters, and requests under one that it lacks are refused."""
    try:
        await server.load_adapter("", "")
    except RequestRefusedError:  # as it should
        pass
    except NoSuchEndpoint:
        return False  # it is none of those that VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 opens
    try:
        await server.load_adapter(NOBODY, f"/no/such/folder/of/{NOBODY}")
    except NoSuchEndpoint:
        pass
    except ReplicaError as error:
        if error.lost:
            raise
        return False  # it was started without --enable-lora
    try:
        await server.ask(look_body(NOBODY, [0], likely_tokens=1, salt=NOBODY), seconds=server.load_seconds)
    except NoSuchEndpoint:
        return facts.extended or await _device(server) != "cpu"  # where rows without an adapter need mending
    raise EngineError(
        f"{server.url} answers requests for models that it does not have, so that a missing adapter would not show; start it without "
        "VLLM_SKIP_MODEL_NAME_VALIDATION"
    )


async def _device(server: Server) -> str:
    config = _mapping((await server.info()).get("vllm_config"))
    return str(_mapping(config.get("device_config")).get("device_type", ""))


async def _config_told(server: Server) -> dict[str, Any]:
    """The model's config as the server prints it: a class name, then JSON."""
    model_config = _mapping(_mapping((await server.info()).get("vllm_config")).get("model_config"))
    told = model_config.get("hf_config")
    if isinstance(told, str):
        try:
            told = json.loads(told[told.find("{") :])
        except ValueError:
            told = None
    return _mapping(told)


def config_in(folder: Path) -> dict[str, Any]:
    """The config of a model's folder, with the end tokens of its generation config; empty where there is no such folder."""
    try:
        config = _mapping(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError):
        return {}
    try:
        named = _mapping(json.loads((folder / "generation_config.json").read_text())).get("eos_token_id")
    except (OSError, ValueError):
        named = None
    return config if named is None else config | {"eos_token_id": named}


def _mapping(told: Any) -> dict[str, Any]:
    """What should be one; empty where it is something else, as an answer that is not to be trusted may be."""
    return told if isinstance(told, dict) else {}


def _ids(named: Any, url: str) -> list[int]:
    ids = [] if named is None else named if isinstance(named, list) else [named]
    if not all(type(token) is int for token in ids):
        raise EngineError(f"{url} tells of end tokens {named!r:.50}, which are no ids; give eos_token_ids")
    return ids
