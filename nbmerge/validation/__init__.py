"""The checks of a validation: small, named, each with a severity and a remedy, and all of them run.

findings    what a check found, and what it says of itself
subject     the directory that is validated, as it stands on disk
files       index, headers, sizes, side files
structure   names, shapes and dtypes against the class that config.json names
values      every element against the checkpoint, or a reference model
health      NaN, infinity, constants, denormals
tokenizer   vocabulary and embedding
running     transformers loads it and it computes
"""
