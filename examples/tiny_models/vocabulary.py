"""Byte-level BPE vocabularies for the tiny models, learnt from the corpus' captions."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, GPT2Tokenizer

CONTEXT_LENGTH = 32


def _merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    import json

    state = json.loads(tokenizer.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


def clip_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """Learn a CLIP tokenizer: lower case, every byte known, so that no word is ever unknown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=760, min_frequency=20, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    _, merges = _merges(learner)
    tokens = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT_LENGTH)


def gpt2_tokenizer(captions: Sequence[str]) -> GPT2Tokenizer:
    """Learn the tokenizer of the captioner's OPT language model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=400, min_frequency=20, initial_alphabet=alphabet, show_progress=False),
    )
    _, merges = _merges(learner)
    tokens = ["<s>", "<pad>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return GPT2Tokenizer(
        vocab=vocab,
        merges=merges,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        model_max_length=64,
        padding_side="left",
    )
