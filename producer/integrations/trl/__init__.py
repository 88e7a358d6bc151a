"""TRL's trainers, fed by our producers: `GRPOTrainer` by a rollout function, `AsyncGRPOTrainer` by a rollout worker. Extra `trl`."""

from importlib.metadata import PackageNotFoundError, version

_OLDEST = (1, 10)


def _check_installed() -> None:
    try:
        found = version("trl")
    except PackageNotFoundError as error:
        raise ImportError("TRL is not installed; install the extra: pip install 'millrace[trl]'") from error
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        raise ImportError(f"TRL {found} is too old: this needs {'.'.join(map(str, _OLDEST))} or newer; pip install 'millrace[trl]'")


_check_installed()

from producer.integrations.trl.corrected import CorrectedGRPOTrainer  # noqa: E402 - the check says what is missing
from producer.integrations.trl.rollouts import GRPORollouts, stored_reward  # noqa: E402
from producer.integrations.trl.worker import AsyncRollouts  # noqa: E402

__all__ = ["AsyncRollouts", "CorrectedGRPOTrainer", "GRPORollouts", "stored_reward"]
