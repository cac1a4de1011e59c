"""From the names and layouts of a framework to those that the model's published checkpoints have."""
