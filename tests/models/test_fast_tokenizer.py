"""tokenizer.json of a tokenizer trained here: the library that reads it gives the same ids."""

import json

import pytest
import tokenizers

from mmrecoder_jax.data import synthetic
from mmrecoder_jax.models.fast_tokenizer import HALVES, tokenizer_json
from mmrecoder_jax.models.tokenizer import SPECIAL_TOKENS, train_sentencepiece

# "ö" and a dash are learned; what else is beyond ASCII is bytes.
OWN = ["Größe \u2013 höher", "für Öl"] * 20
TEXTS = [
    "",
    "\n",
    " \n  a  \n",
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Draw.<|im_end|>\n",
    "< |im_end|> <|im_end|",
    "def f(x):\n    if x:\n\t\treturn  'a'\r\n",
    "Größe — höher \u2013 日本語 😀 \u2581 \u23ce \u2423 \u001f \x00 \x7f",
    "Ġ Ċ Ã¶ \U0001d7f6\U0001d675 \U000f0000",
]


@pytest.fixture(scope="module")
def pair():
    """(ours, theirs)."""
    texts = [*synthetic.tokenizer_texts(500, seed=0), *OWN]
    ours = train_sentencepiece(texts, 512, synthetic.words())
    return ours, tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_same(pair, text):
    ours, theirs = pair
    assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


def test_ids_of_charts_are_the_same_and_their_text_comes_back(pair):
    ours, theirs = pair
    for index in range(300):
        text = synthetic.chart_spec(3, index, "val").response() + "Größe \u2013 höher"
        ids = theirs.encode(text).ids
        assert ids == ours.encode(text) and theirs.decode(ids) == text


def test_every_id_has_one_name(pair):
    ours, theirs = pair
    assert theirs.get_vocab_size() == ours.vocab_size == 512
    assert [theirs.id_to_token(ours.token_id(token)) for token in SPECIAL_TOKENS] == [
        *SPECIAL_TOKENS
    ]
    pieces = ours.pieces()
    for i, piece in enumerate(pieces[1:], 1):
        assert theirs.decode([i]) == piece == ours.decode([i])


def test_bytes_that_no_piece_covers_are_shown_as_digits(pair):
    ours, theirs = pair
    ids = ours.encode("日")  # E6 97 A5
    assert theirs.decode(ids) == "".join(HALVES[d] for d in (14, 6, 9, 7, 10, 5))
    assert ours.decode(ids) == "日"
