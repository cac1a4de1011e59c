"""The checks of a validation: small, named, each with a severity and a remedy, and all of them run.

findings      what a check found, and what it says of itself
subject       the directory that is validated, as it stands on disk
checks        all checks but those of values, in their order
files         headers and index                recorded      the receipt: files, sizes, digests
side          config, tokenizer files, paths   templates     chat templates
beside        the small files against those of the checkpoint         on_disk       paths that a receipt names
structure     names and shapes of the class, what is tied    expectation   what the class expects
element_types dtypes
tokenizer     vocabulary and embedding
running       transformers loads it and it computes          loading, computing, room, quiet: its parts
value_checks  one pass over all elements for source, reference and health
values        comparisons, block by block      against       pairs the tensors that are compared
planned       the plan whose result a directory should be
health        NaN, infinity, constants, denormals            bits          how dtypes spell them
report        what a validation returns
"""
