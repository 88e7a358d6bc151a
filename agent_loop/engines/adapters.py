"""Adapters of one engine: small weights on top of the model's, each known for ever by its name and version; who uses which."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from agent_loop.errors import AdapterError, RequestRefusedError, WeightUpdateError
from agent_loop.sampling import version_number, whole


@dataclass(frozen=True, slots=True)
class Adapter:
    """What one set of adapter weights is called, once and for all: other weights have another version, or another name.

    Attributes:
        name: which adapter.
        version: how many updates it has had; stamped on every token that it samples.
    """

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def check_keep(keep: int) -> int:
    """How many versions of a name stay loaded, or `ValueError`."""
    if whole("keep", keep) < 1:
        raise ValueError(f"keep={keep} versions would forget the one that is added; it must be 1 or more")
    return keep


class InUse(NamedTuple):
    """An adapter that a request uses, and what the engine has loaded of it."""

    adapter: Adapter
    loaded: Any


class Adapters:
    """Which adapters an engine has, by name and version.

    Of each name so many versions are kept as was asked for; a version beyond them is forgotten as soon as nobody uses it.

    Args:
        forget: called with an adapter and what was loaded of it, when it is gone.
    """

    def __init__(self, forget: Callable[[Adapter, Any], None]) -> None:
        self._forget = forget
        self._loaded: dict[Adapter, Any] = {}
        self._kept: dict[str, list[Adapter]] = {}  # by name, the newest last
        self._newest: dict[str, int] = {}  # of all there ever were: no two sets of weights share a name and a version
        self._users: Counter[Adapter] = Counter()
        self._loading = self._barring = 0

    @property
    def loaded(self) -> tuple[Adapter, ...]:
        """Those that are there, in the order in which they came; old versions that requests still use are among them."""
        return tuple(self._loaded)

    def newest(self, name: str) -> int:
        """The highest version that this name ever had; 0 where it had none."""
        return self._newest.get(name, 0)

    def find(self, wanted: object) -> Adapter:
        """The newest version of a name, or the very adapter, if it is loaded.

        Raises:
            RequestRefusedError: there is none; those that there are are named.
        """
        if isinstance(wanted, str) and wanted in self._kept:
            return self._kept[wanted][-1]
        if isinstance(wanted, Adapter) and wanted in self._loaded:
            return wanted
        known = f"loaded are {', '.join(map(str, self._loaded))}" if self._loaded else "none is loaded"
        shown = str(wanted) if isinstance(wanted, Adapter) else repr(wanted)
        raise RequestRefusedError(f"unknown adapter {shown:.60}; {known}; load it with add_adapter, or leave it out for the model itself")

    @contextmanager
    def using(self, wanted: object) -> Iterator[InUse | None]:
        """Keep an adapter loaded in this block, whatever becomes of it meanwhile; None is the model itself.

        Raises:
            RequestRefusedError: see `find`.
        """
        if wanted is None:
            yield None
            return
        adapter = self.find(wanted)
        self._users[adapter] += 1
        try:
            yield InUse(adapter, self._loaded[adapter])
        finally:
            self._users[adapter] -= 1
            self._settle(adapter)

    @contextmanager
    def loading(self, name: str, version: int | None) -> Iterator[Adapter]:
        """The adapter to be loaded in this block, which may `add` it.

        Raises:
            ValueError: an empty name, or a version that is not above all that the name ever had, or above what tokens can carry.
            AdapterError: the model's weights are being changed.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"an adapter cannot be named {name!r:.60}; give a text that is not empty")
        newest = self._newest.get(name, -1)
        number = newest + 1 if version is None else version_number(version)
        if number < 0 or number <= newest:
            raise ValueError(
                f"version={number} of adapter {name!r} is not above {newest}, the highest that it had: a name and a version are one set of "
                "weights for ever; count up, and after a rewind to an older checkpoint make a new engine"
            )
        if self._barring:
            raise AdapterError(f"adapter {name!r} was not loaded: the model's weights are being updated; add it afterwards")
        self._loading += 1
        try:
            yield Adapter(name, number)
        finally:
            self._loading -= 1

    def add(self, adapter: Adapter, loaded: Any, keep: int) -> None:
        """It is there; `keep` versions of its name stay, it included."""
        self._newest[adapter.name] = adapter.version
        self._loaded[adapter] = loaded
        versions = [*self._kept.get(adapter.name, ()), adapter]
        self._kept[adapter.name] = versions[-keep:]
        for old in versions[:-keep]:
            self._settle(old)

    def remove(self, name: str) -> None:
        """Keep no version of it.

        Raises:
            RequestRefusedError: there is none.
        """
        self.find(str(name))  # all versions go: an `Adapter`, which is one of them, is no name
        for old in self._kept.pop(name):
            self._settle(old)

    @contextmanager
    def barred(self) -> Iterator[None]:
        """None is there, and none comes, while the model's weights change in this block: adapters belong to the weights under them.

        Raises:
            WeightUpdateError: some are there, or on their way.
        """
        if self._loaded or self._loading:
            there = ", ".join(map(str, self._loaded)) or "one that is being loaded"
            raise WeightUpdateError(
                f"the weights stay as they are, because adapters ({there}) were made for them; call remove_adapter first, let their "
                "requests end, and add adapters that were made for the new weights"
            )
        self._barring += 1
        try:
            yield
        finally:
            self._barring -= 1

    def clear(self) -> list[Any]:
        """Let all go, used or not, for an engine that is closed; what was loaded of them."""
        left = list(self._loaded.values())
        self._loaded.clear()
        self._kept.clear()
        return left

    def _settle(self, adapter: Adapter) -> None:
        """Forget it, if it is neither kept nor used."""
        if adapter in self._loaded and not self._users[adapter] and adapter not in self._kept.get(adapter.name, ()):
            del self._users[adapter]
            self._forget(adapter, self._loaded.pop(adapter))
