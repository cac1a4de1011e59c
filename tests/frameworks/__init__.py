"""Checkpoints that the real frameworks write, in real gloo processes, merged to bit equality."""
