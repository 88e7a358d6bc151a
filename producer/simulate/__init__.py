"""Simulating a run: the strategies of production, an engine without a model, and a clock that does not wait."""
