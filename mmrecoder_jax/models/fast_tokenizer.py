"""tokenizer.json of a tokenizer trained here: what `transformers` reads, with the same ids.

The `tokenizers` library has no byte halves, so they are made of its parts. Its normaliser spells
every byte of a text as one character (the alphabet of byte-level BPE: printable ASCII stands for
itself, a space is "Ġ"), then

    a covered character beyond ASCII    "ö", spelled "Ã¶"    ->  a stand-in, one character
    a byte that nothing covers          0xE2                 ->  its halves, "𝙴𝟸"

so that a merge of characters is a merge of the pieces they stand for. Decoding runs backwards, but
halves stay the hexadecimal digits that they are written with: no decoder of the library joins two
tokens into one byte. Ours does (`SentencePieceTokenizer.decode`).
"""

import functools
from typing import Any

from mmrecoder_jax.models.tokenizer import SPECIAL_TOKENS, SentencePieceTokenizer

# Hexadecimal digits of Unicode's monospace alphabet: no text holds them once its bytes are spelled.
HALVES = [*map(chr, range(0x1D7F6, 0x1D800)), *map(chr, range(0x1D670, 0x1D676))]
_FIRST_STAND_IN = 0xF0000  # a plane for private use


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """The character of each byte in byte-level BPE: itself where it can be seen, else one beyond
    all bytes.
    """
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte) if byte in seen else chr(next(others)) for byte in range(256))


def spelled(text: str) -> str:
    """The text with a character for each of its bytes.

    >>> spelled("a ö")
    'aĠÃ¶'
    """
    return "".join(byte_alphabet()[byte] for byte in text.encode())


def tokenizer_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The content of tokenizer.json.

    Ids of text, special tokens included, are those of the tokenizer, except where two ways to merge
    the same piece overlap: SentencePiece takes the left one, this the one listed first.
    """
    pieces = tokenizer.pieces()
    covered = {c for piece in pieces if piece is not None for c in piece}
    beyond = sorted(c for c in covered if len(c.encode()) > 1)
    stand_in = {c: chr(_FIRST_STAND_IN + i) for i, c in enumerate(beyond)}
    spellings = {c: stand_in.get(c) or spelled(c) for c in covered}
    words = ["".join(spellings[c] for c in piece) for piece in pieces[1:] if piece is not None]
    vocabulary = {name: i for i, name in enumerate(["<unk>", *words, *HALVES])}
    plain = {byte_alphabet()[ord(c)] for c in covered if ord(c) < 128}
    rare = [byte for byte in range(256) if byte_alphabet()[byte] not in plain]
    shown = [(spelled(c), stand_in[c]) for c in beyond]
    halved = [(byte_alphabet()[byte], HALVES[byte // 16] + HALVES[byte % 16]) for byte in rare]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": tokenizer.token_id(token),
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token in SPECIAL_TOKENS
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "ByteLevel"}, *map(_replace, shown + halved)],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                *(_replace((after, before)) for before, after in shown),
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": False,
                    "use_regex": False,
                },
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [
                [word[:cut], word[cut:]]
                for word in words
                for cut in range(1, len(word))
                if word[:cut] in vocabulary and word[cut:] in vocabulary
            ],
        },
    }


def _replace(change: tuple[str, str]) -> dict[str, Any]:
    before, after = change
    return {"type": "Replace", "pattern": {"String": before}, "content": after}


def tokenizer_config() -> dict[str, Any]:
    """The content of tokenizer_config.json, in fields that transformers 4.57 and 5 know."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
