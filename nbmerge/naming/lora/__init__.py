"""Adapters in a checkpoint: recognised by their names, and folded into the weights, split off, or written alone."""
