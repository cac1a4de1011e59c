"""Comparison of two models, or of the steps of a run, in one streaming pass.

sources      what a user points at, as two models or as the checkpoints of a run
alignment    which tensor of the one is which of the other, and what is left out (left_out)
differ       `diff_weights`: the pass over all blocks, on threads; collector: where they meet
kernel       the statistics of one block; careful and integers: of what it leaves to them; tally: while they grow
elements     what the bits of an element mean
statistics   what is known of a tensor's change, and adds up in any order
rank_one     how much of a matrix's update is one outer product
rolling      layers and kinds of modules
model_diff   the report; sentence: its one sentence; frames: as a data frame
trajectory   the report of a run; running: how it is followed
"""
