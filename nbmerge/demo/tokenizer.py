"""A small real tokenizer, made here: byte-level BPE as Qwen2 has it, with a token for each row of the embedding."""

from __future__ import annotations

import string
from typing import Any

from nbmerge.demo.models import VOCABULARY

END = "<|endoftext|>"
_SPACE = "Ġ"  # how byte-level BPE writes the space before a word
_ALPHABET = (*string.ascii_letters, *string.digits, *".,:;-'?!", _SPACE)
_WORDS = (
    "the every rank of a mesh holds shard model merge reads each once whole tensor writes to file that any can load "
    "nothing is rounded on way so weights come out are went in bit for and proved equal when byte disk "
    "layer head expert index name shape size plan copy layout dtype config train save open start"
)


def build_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` of exactly as many tokens as the demonstration models have rows."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens = dict.fromkeys([END, *_ALPHABET])
    merges: list[tuple[str, str]] = []
    for left, right in _word_merges():
        if left + right not in tokens and len(tokens) < VOCABULARY:
            tokens[left + right] = None
            merges.append((left, right))
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # transformers 4 would also give token types, which models like Qwen2 do not take.
    names = [name for name in PreTrainedTokenizerFast.model_input_names if name != "token_type_ids"]
    options = {"model_input_names": names} if names != PreTrainedTokenizerFast.model_input_names else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, **options)


def _word_merges() -> list[tuple[str, str]]:
    """The merges that put each word together from its front, with the space before it."""
    return [(_SPACE + word[:i], letter) for word in _WORDS.split() for i, letter in enumerate(word)]
