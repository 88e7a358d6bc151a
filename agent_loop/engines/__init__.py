"""Engines: prompt tokens in, sampled tokens out. Import the module of the engine you use; none is imported here."""
