"""Decode attention as it is timed: pools of caches, programs, inputs, checks, and the runner."""
