"""Two vLLM servers with one model on this machine, and one engine over them; then one is killed, and no response is lost.

    VLLM_CPU_KVCACHE_SPACE=1 python examples/two_replicas.py MODEL --dtype float32 --max-model-len 512 --enforce-eager

What stands behind MODEL goes to both servers. With GPUs, give each its own: see `environment`.
"""

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agent_loop import SamplingParams
from agent_loop.engines.vllm_server import VLLMServerEngine

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """Of a server; add {"CUDA_VISIBLE_DEVICES": "0"} or the like to give it a GPU of its own."""
    return os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",  # pauses and new weights; whoever reaches these endpoints governs the server
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": str(ROOT),  # for the worker extension, where the library is not installed
        "MILLRACE_ENGINE_OWNER": str(os.getpid()),  # the server ends with this process, however that ends
    }


class Replica:
    """One server on loopback, in a process group of its own; `with` ends it."""

    def __init__(self, model: str | Path, *arguments: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--enable-scale-out", "--logprobs-mode", "processed_logprobs"),
            *("--worker-extension-cls", "agent_loop.engines.server.worker.WorkerExtension"),
            *("--disable-uvicorn-access-log", *arguments),
        ]
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, env=environment(), stdout=output, stderr=output, start_new_session=True)

    def kill(self) -> None:
        """End all of its processes at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def __enter__(self) -> "Replica":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.process.wait()


async def show(replicas: list[Replica]) -> None:
    """Sixteen responses, in the midst of which a replica dies."""
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    async with VLLMServerEngine([replica.url for replica in replicas]) as engine, asyncio.TaskGroup() as tasks:
        print(*(f"{one.url} serves" for one in engine.replicas()), sep="\n")
        begun = asyncio.Event()
        calls = [
            tasks.create_task(engine.generate([5, 6, 7 + number], params, request_id=str(number), on_tokens=lambda _: begun.set()))
            for number in range(16)
        ]
        await begun.wait()
        replicas[0].kill()
        print(f"killed {replicas[0].url}")
        lengths = [len((await call).token_ids) for call in calls]
        print(f"{len(lengths)} responses of {min(lengths)} to {max(lengths)} tokens")
        print(*(f"{one.url} {'serves' if one.serving else f'is out: {one.cause}'}" for one in engine.replicas()), sep="\n")


def main() -> None:
    """Serve, and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    args, more = parser.parse_known_args()
    with ExitStack() as stack:
        replicas = [stack.enter_context(Replica(args.model, *more, log=Path(f"replica-{number}.log"))) for number in range(2)]
        print("starting, which takes a minute; the servers write to replica-0.log and replica-1.log")
        asyncio.run(show(replicas))


if __name__ == "__main__":
    main()
