"""Options that give what other libraries give, so that a run of theirs can be matched.

Read from the sources of TRL 1.16 (`GRPOTrainer`, `RLOOTrainer`, `AsyncGRPOTrainer`'s worker), verl at b178a3c
(`core_algos.py`, `masked_whiten`) and OpenRLHF at 3c3be62 (`experience_maker.py`). What stays ours is in docs/explanation/estimators.md.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from agent_loop.arguments import one_of, text
from producer.experience.config import ALIASES, AdvantageConfig

Preset = Literal["trl", "trl_async", "verl", "openrlhf"]

_VERL_WHITEN = {"whiten": "full", "whiten_ddof": 1, "whiten_eps": 1e-8}
_OPENRLHF_WHITEN = {"whiten": "full", "whiten_ddof": 0, "whiten_eps": 1e-8}
_CAPPED = {"reward_clip": (-10.0, 10.0)}
PRESETS: Mapping[str, Mapping[str, dict[str, Any]]] = MappingProxyType(
    {
        "trl": {"grpo": {"ddof": 1, "eps": 1e-4}, "dr_grpo": {}, "rloo": {}, "gdpo": {"ddof": 1, "eps": 1e-4}},
        "trl_async": {"grpo": {"ddof": 0, "eps": 1e-8}},
        "verl": {
            "grpo": {"ddof": 1, "eps": 1e-6},
            "dr_grpo": {},
            "rloo": {},
            "opo": {},
            "remax": {},
            "reinforce++": {"gamma": 1.0} | _VERL_WHITEN,
            "reinforce++_baseline": _VERL_WHITEN,
            "gae": {"gamma": 1.0, "lam": 1.0} | _VERL_WHITEN,
        },
        "openrlhf": {
            "grpo": {"ddof": 1, "eps": 1e-9} | _CAPPED,
            "dr_grpo": _CAPPED,
            "rloo": _CAPPED,
            "reinforce++": {"gamma": 1.0} | _OPENRLHF_WHITEN | _CAPPED,
            "reinforce++_baseline": _OPENRLHF_WHITEN | _CAPPED,
            "gae": {"gamma": 1.0, "lam": 1.0} | _OPENRLHF_WHITEN | _CAPPED,
        },
    }
)


def preset(name: Preset, estimator: str = "grpo", **changes: Any) -> AdvantageConfig:
    """The configuration that gives that library's numbers: degrees of freedom, epsilons, whitening and caps.

    OpenRLHF calls "grpo" `group_norm`, and "reinforce++" `reinforce`.

    Args:
        changes: other fields of `AdvantageConfig`, over the preset's.

    Raises:
        ValueError: the library has no such estimator, or another one under that name.
    """
    known = PRESETS[one_of("name", name, get_args(Preset))]
    wanted = ALIASES.get(text("estimator", estimator, "the name of one"), estimator)
    if wanted not in known:
        raise ValueError(f"{name} has no estimator={estimator!r} of these numbers; it has {sorted(known)}")
    return replace(AdvantageConfig(wanted, **known[wanted]), **changes)
