"""Carries a plan out: byte copies where nothing changes, a block at a time where something does."""
