"""What a rollout is, and the durable store that keeps them."""
