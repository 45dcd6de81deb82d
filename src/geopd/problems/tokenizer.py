"""A character tokenizer of 24 symbols, made locally and saved beside every checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["VOCABULARY", "character_tokenizer"]

# The last three are in no text of ours: they keep the vocabulary at 24 and catch characters that do not belong.
VOCABULARY = ("<pad>", "<eos>", *"0123456789", *"+-=> ", *"crs", "*", ":", "<unk>", "<bos>")


def character_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the miniature: one token per character, ``<pad>`` = 0 and ``<eos>`` = 1.

    WordLevel over single characters; decoding concatenates. Prompts are padded on the left, as generation needs.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: index for index, symbol in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
