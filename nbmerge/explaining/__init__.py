"""Why a tensor is not as the model wants it: a table of patterns, and the explanations that they make.

Below naming and loaders, which use it; `nbmerge.explainer` asks it of checkpoints, errors and shapes.

candidates                       what a pattern returns, and how strong its evidence is
shape_, model_, head_, name_patterns, table      the patterns, and their order
sizes, anatomy, diagnosis        whole models: another family, another size
alike, subjects                  layers told once; several shapes that must agree on one number of ranks
chain                            exceptions: notes, groups, causes
messages                         what torch, transformers, vLLM and DeepSpeed say on loading
explanation                      the report
"""
