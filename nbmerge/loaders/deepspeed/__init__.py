"""DeepSpeed ZeRO checkpoints, stages 0 to 3, universal ones among them, without DeepSpeed.

directories  the tag and its files                masters      the optimizer files of all ranks
pickles      what the pickles name                contents     which tensor comes from where
states       what a file says, checked            refusals     forms that are refused in words
partitions   flat vectors into parameters         universal    one file for each parameter
pipeline     one file for each layer              loader       the loader
"""

from nbmerge.loaders.deepspeed.loader import DeepSpeedLoader

__all__ = ["DeepSpeedLoader"]
