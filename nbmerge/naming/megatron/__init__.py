"""Megatron's names and layouts → the published names and layouts of Hugging Face models.

canonical   one form of the many that names and stacked tensors have on disk
rules       what can happen to a tensor on its way: copied, cut, un-padded, transposed, packed
blocks      rows that families share
families    the tables, one file for each family
matching    which rule of a table a tensor falls under
rename      applies a family's table to a checkpoint
stated      what the run recorded of its model, held against config.json and the table
prediction  layers that predict further tokens, which no model class would miss a part of
heads       value heads, and configs that have another kind of head
advice      what is near where no rule fits
absences    what is missing, told in the largest parts that are gone
"""
