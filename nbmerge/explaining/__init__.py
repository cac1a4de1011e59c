"""Why a tensor is not as the model wants it: a table of patterns, and the explanations that they make.

Pure, so that naming and loaders can use them      candidates, shape_patterns, model_patterns, name_patterns, table
Whole models                                       sizes, features, anatomy, diagnosis
What a user calls                                  messages, explanation, explainer
"""
