"""`create_sampler`: samplers by name, the built-in ones, those registered by a decorator, and those of installed packages."""

import importlib
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from agent_loop.beam_search import BeamSearchSampler
from agent_loop.engines.base import Engine
from agent_loop.sampler import Sampler

ENTRY_POINTS = "millrace.samplers"
"""The group of entry points in which an installed package offers its samplers."""

Factory = TypeVar("Factory", bound=Callable[..., Sampler])

_registered: dict[str, Callable[..., Sampler]] = {}


def register_sampler(name: str) -> Callable[[Factory], Factory]:
    """Decorate a function or a class, to be called by `create_sampler(name, ...)` and to give a `Sampler`.

    A package does the same without being imported by an entry point of the group `millrace.samplers`.

    Raises:
        ValueError: the name is empty or taken.
    """
    if not isinstance(name, str) or not name or name in _BUILT_IN or name in _registered:
        raise ValueError(f"a sampler cannot be registered as {name!r:.60}: names are texts, not empty and not taken; taken are {_known()}")

    def register(factory: Factory) -> Factory:
        _registered[name] = factory
        return factory

    return register


def create_sampler(name: str, *args: Any, **options: Any) -> Sampler:
    """A sampler by name; what it needs is imported now, and nothing is started: `async with` or `with` opens it.

    Args:
        name: "simulated", "transformers", "vllm", "vllm_server", "beam_search", or one registered here or by a package.
        args: of its factory; for "transformers" and "vllm" the model, for "vllm_server" the addresses, for "beam_search" the engine.
        options: `tokenizer` and `template` of the sampler, others of the engine. By default the tokenizer is the model folder's.

    Raises:
        ValueError: no sampler has this name; those that are known are listed.
        TypeError: the factory gave no `Sampler`.
    """
    sampler = _factory(name)(*args, **options)
    if not isinstance(sampler, Sampler):
        raise TypeError(f"the sampler {name!r} is made by something that gave {sampler!r:.60}, no Sampler")
    return sampler


def _factory(name: str) -> Callable[..., Any]:
    if not isinstance(name, str):
        raise ValueError(f"{name!r:.60} is no name of a sampler; known are {_known()}")
    if factory := _registered.get(name) or _BUILT_IN.get(name):
        return factory
    offers = _offered(name)
    if not offers:
        raise ValueError(f"no sampler is named {name!r}; known are {_known()}")
    if len(offers) > 1:
        raise ValueError(f"several packages offer a sampler {name!r}: {sorted(one.value for one in offers)}; uninstall all but one")
    loaded: Callable[..., Any] = offers[0].load()
    return loaded


def _offered(name: str) -> list[EntryPoint]:
    # One package may be found twice, by two entries of the path.
    return list({one.value: one for one in entry_points(group=ENTRY_POINTS, name=name)}.values())


def _known() -> list[str]:
    return sorted({*_BUILT_IN, *_registered, *(one.name for one in entry_points(group=ENTRY_POINTS))})


# The built-in ones. Their engines are imported by name: whoever imports this module needs none of them.


def _made(module: str, engine: str, *args: Any, tokenizer: Any, template: Any, options: dict[str, Any]) -> Sampler:
    made = getattr(importlib.import_module(f"agent_loop.engines.{module}"), engine)(*args, **options)
    sampler = Sampler(made, tokenizer, seed=options.get("seed"))
    sampler.set_template(template)
    return sampler


def _simulated(*, tokenizer: Any = None, template: Any = None, **options: Any) -> Sampler:
    return _made("simulated", "SimulatedEngine", tokenizer=tokenizer, template=template, options=options)


def _transformers(model: Any, *, tokenizer: Any = None, template: Any = None, **options: Any) -> Sampler:
    tokenizer = _tokenizer(model) if tokenizer is None else tokenizer
    options |= {"tokenizer": tokenizer}
    return _made("transformers", "TransformersEngine", model, tokenizer=tokenizer, template=template, options=options)


def _vllm(model: Any, *, tokenizer: Any = None, template: Any = None, **options: Any) -> Sampler:
    tokenizer = _tokenizer(model) if tokenizer is None else tokenizer
    return _made("vllm", "VLLMEngine", model, tokenizer=tokenizer, template=template, options=options)


def _vllm_server(urls: Any, *, tokenizer: Any = None, template: Any = None, seed: int | None = None, **options: Any) -> Sampler:
    engine = importlib.import_module("agent_loop.engines.vllm_server").VLLMServerEngine(urls, **options)
    sampler = Sampler(engine, tokenizer, seed=seed)
    sampler.set_template(template)
    return sampler


def _tokenizer(model: Any) -> Any:
    """The model's own; None for a model object and for a folder without one."""
    if not isinstance(model, str | Path) or (Path(model).is_dir() and not any(Path(model).glob("tokenizer*"))):
        return None
    return importlib.import_module("transformers").AutoTokenizer.from_pretrained(model)


def _beam_search(engine: Engine, *, tokenizer: Any = None, template: Any = None, **options: Any) -> Sampler:
    sampler = BeamSearchSampler(engine, tokenizer, **options)
    sampler.set_template(template)
    return sampler


_BUILT_IN: dict[str, Callable[..., Sampler]] = {
    "beam_search": _beam_search,
    "simulated": _simulated,
    "transformers": _transformers,
    "vllm": _vllm,
    "vllm_server": _vllm_server,
}
