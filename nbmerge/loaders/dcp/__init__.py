"""Directories of torch.distributed.checkpoint: one index and `.distcp` files, or safetensors files for each rank."""
