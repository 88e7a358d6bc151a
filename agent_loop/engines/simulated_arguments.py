"""The arguments of a `SimulatedEngine`, checked."""

from agent_loop.engines.simulated_costs import CostModel
from agent_loop.engines.simulated_policy import FillerPolicy, Lengths, Policy, Script, ScriptedPolicy
from agent_loop.engines.simulated_table import TablePolicy
from agent_loop.sampling import seed_number, whole


def costs_of(costs: CostModel | None, slots: int | None, tokens_per_second: float | None) -> CostModel:
    """What serving costs: as it is given, or in its short form."""
    if costs is None:
        return CostModel(64 if slots is None else slots, tokens_per_second)
    if slots is not None or tokens_per_second is not None:
        raise ValueError(f"{slots=} and {tokens_per_second=} belong into costs, where that is given")
    return costs


def policy_of(
    script: Script | None, lengths: Lengths | None, policy: Policy | None, *, seed: int, vocab_size: int, eos_token_id: int
) -> Policy:
    """What is generated, by the one of the three that is given; by a `TablePolicy` without any."""
    if sum(given is not None for given in (script, lengths, policy)) > 1:
        raise ValueError("script, lengths and policy each say what is generated; give at most one")
    for name, function in (("script", script), ("lengths", None if isinstance(lengths, int) else lengths)):
        if function is not None and not callable(function):
            raise ValueError(f"{name}={function!r:.60} cannot be called; give a function")
    if policy is not None and not hasattr(policy, "start"):
        raise ValueError(f"policy={policy!r:.60} is no Policy; give one such as TablePolicy()")
    if whole("vocab_size", vocab_size) < 1 or not 0 <= whole("eos_token_id", eos_token_id) < vocab_size:
        raise ValueError(f"{eos_token_id=} is no token of {vocab_size=}; give a vocabulary of 1 or more, and an id in it")
    seed_number("seed", seed)
    if policy is not None:
        return policy
    if script is not None:
        return ScriptedPolicy(lambda request: script(request.prompt_ids), vocab_size, frozenset({eos_token_id}))
    if lengths is not None:
        return FillerPolicy(lengths, vocab_size, eos_token_id)
    return TablePolicy(vocab_size, frozenset({eos_token_id}), seed)
