"""Which weights are in force, and how a server comes to hold them.

A label on each server says which weights it holds: "default" as it was started, or a name that is made once, for one update of one
engine. vLLM puts it on every token. So a server that was restarted, that missed an update, or that another engine gave other weights
is known as such. While a load is under way the label says that too: whoever finds it later finds weights that may be a mixture.
"""

import asyncio
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent_loop.engines.base import WeightSource
from agent_loop.engines.checkpoint import Checkpoint, check_fits, read_checkpoint, write_checkpoint
from agent_loop.engines.server.client import Server
from agent_loop.engines.server.faults import ReplicaError
from agent_loop.errors import EngineError
from agent_loop.sampling import LARGEST_VERSION

AT_START = "default"
LOADING = "millrace-loading"


def version_of(label: str) -> int | None:
    """The version that a label names; None where it names none."""
    last = "0" if label == AT_START else label.rpartition(":")[2]
    return int(last) if last.isascii() and last.isdigit() and len(last) <= 10 and int(last) <= LARGEST_VERSION else None


@dataclass(frozen=True)
class Staged:
    """New weights that fit the model, in a folder that servers can load, and the temporary folder if they lie in one."""

    checkpoint: Checkpoint
    scratch: "tempfile.TemporaryDirectory[str] | None" = None

    def drop(self) -> None:
        """Remove the temporary folder."""
        if self.scratch is not None:
            self.scratch.cleanup()


class Weights:
    """The weights in force.

    Attributes:
        version: of them.
        label: of them; None while no server may be asked, since they hold what an earlier run left.
        versions: the version that each label stands for.
        recompute: at an update, compute the attention cache of requests in flight anew.
        tied: whether the model's output matrix is its input embedding.
    """

    def __init__(self, folder: str | Path | None, *, recompute: bool) -> None:
        self.label: str | None = None
        self.version = 0
        self.versions: dict[str, int] = {}
        self.recompute = recompute
        self.tied = True
        self._folder = folder
        self._name, self._updates = uuid.uuid4().hex[:12], 0
        self._model: Checkpoint | None = None
        self._staged: Staged | None = None

    def begin(self, label: str | None, root: str, *, tied: bool) -> None:
        """What the servers hold at the opening; `root` is where they had their model from."""
        self.label, self.tied = label, tied
        if label is not None:
            self.versions[label] = self.version = version_of(label) or 0
        try:
            self._model = read_checkpoint(root)
        except (ValueError, OSError):
            self._model = None  # a name on a hub, or a folder of another machine: the first update says what the model is made of
        if label == AT_START and self._model is not None:
            self._staged = Staged(self._model)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the model's tensors, by name; empty where they are not known here."""
        return {} if self._model is None else self._model.shapes

    def new_label(self, version: int) -> str:
        """A label that no other weights have."""
        self._updates += 1
        return f"millrace:{self._name}:{self._updates}:{version}"

    async def stage(self, source: WeightSource) -> Staged:
        """The new weights where servers can load them; raises `ValueError` where they do not fit the model."""
        if isinstance(source, str | Path):
            return Staged(await asyncio.to_thread(self._checked, Path(source)))
        scratch = tempfile.TemporaryDirectory(prefix="millrace-weights-", dir=self._folder, ignore_cleanup_errors=True)
        try:
            await asyncio.to_thread(write_checkpoint, source, Path(scratch.name))
            return Staged(await asyncio.to_thread(self._checked, Path(scratch.name)), scratch)
        except BaseException:
            scratch.cleanup()
            raise

    def _checked(self, folder: Path) -> Checkpoint:
        new = read_checkpoint(folder)
        if self._model is not None:
            check_fits(new, self._model, tied=self.tied)
        return new

    def put_in_force(self, staged: Staged, label: str, version: int) -> None:
        """The servers hold them; those before are dropped."""
        before, self._staged = self._staged, staged
        self._model = self._model or staged.checkpoint
        self.label, self.version, self.versions[label] = label, version, version
        if before is not None:
            before.drop()

    def folder(self) -> Path:
        """Where the weights in force can be loaded from again, or `ReplicaError` if nowhere."""
        if self._staged is None or not self._staged.checkpoint.unchanged():
            raise ReplicaError(
                "it holds other weights than those in force, and their folder is gone or unknown; it waits for the next update"
            )
        return self._staged.checkpoint.folder

    def drop(self) -> None:
        """Remove the temporary folder, if there is one."""
        if self._staged is not None:
            self._staged.drop()


async def check_seen(server: Server, folder: Path, *, extended: bool) -> None:
    """Raise `EngineError` if the server does not find the folder: vLLM would give its old weights up before it looks."""
    if extended and await server.rpc("sees_folder", str(folder)) != ["True"] * len(await server.rpc("sees_folder", "/")):
        raise EngineError(f"{server.url} does not find {folder}; save weights on a file system that all servers share")


async def load(server: Server, folder: Path, label: str, *, extended: bool) -> None:
    """Put weights into a paused server and label them; breaks off with the label saying so."""
    await server.set_label(f"{LOADING}:{label}")
    await server.rpc("reload_weights", weights_path=str(folder))
    if extended:
        await server.rpc("refresh_output_matrix")
