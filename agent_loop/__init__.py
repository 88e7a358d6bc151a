"""How one rollout comes to be: engines that speak tokens, agent loops that speak turns, rewards that judge."""
