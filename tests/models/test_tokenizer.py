"""Tokenizers: lossless, deterministic, with the special tokens of the chat template."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from mmrecoder_jax.data import synthetic
from mmrecoder_jax.models import tokenizer as tokenizers
from mmrecoder_jax.models.files import CheckpointError
from mmrecoder_jax.models.tokenizer import (
    SPECIAL_TOKENS,
    PretrainedTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)

HARD_TEXTS = [
    "",
    "\n",
    "  leading and trailing  ",
    "def f(x):\n    if x:\n\t\treturn  'a'\r\n",
    "Größe — 日本語 😀 \u2581 \u23ce \u2423 \u001f \x00",
]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return train_sentencepiece(synthetic.tokenizer_texts(500, seed=0), 512, synthetic.words())


@pytest.fixture(scope="module")
def pretrained_dir(tmp_path_factory) -> str:
    """A byte-level BPE with Qwen's special tokens, saved as a published checkpoint saves its
    tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(synthetic.responses(50, seed=0), trainer)
    directory = str(tmp_path_factory.mktemp("pretrained"))
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(directory)
    return directory


def test_the_files_of_a_published_tokenizer_are_copied_unchanged(pretrained_dir, tmp_path):
    """What transformers 5 would write in their place, 4.57 cannot read."""
    source = Path(pretrained_dir)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    load_tokenizer(source).save(tmp_path / "a")
    load_tokenizer(tmp_path / "a").save(tmp_path / "b")
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    for name in names:
        assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 < i < tokenizer.vocab_size for i in ids)


def test_round_trip_of_charts(tokenizer):
    for index in range(100):
        response = synthetic.chart_spec(7, index, "test").response()
        assert tokenizer.decode(tokenizer.encode(response)) == response


def test_vocabulary_is_filled_exactly_and_answers_are_short(tokenizer):
    assert tokenizer.vocab_size == 512
    lengths = [
        len(tokenizer.encode(synthetic.chart_spec(7, index, "val").response()))
        for index in range(200)
    ]
    assert sum(lengths) / len(lengths) < 45
    assert max(lengths) < 80


def test_words_are_not_glued_to_code(tokenizer):
    """Each value, colour and title is a decision of its own: pieces with a word in them hold
    nothing else.
    """
    pieces = [
        tokenizer.decode([i]) for i in tokenizer.encode(synthetic.chart_spec(0, 1).response())
    ]
    assert {"barh", "red", "Votes"} <= set(pieces)
    assert "5" in pieces
    assert not [piece for piece in pieces if "Votes" in piece and piece != "Votes"]


def test_special_tokens(tokenizer):
    text = "<|im_start|>user\nhi<|im_end|>"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.token_id("<|im_start|>") and ids[-1] == tokenizer.token_id(
        "<|im_end|>"
    )
    assert tokenizer.decode(ids) == "user\nhi"
    assert tokenizer.decode(ids, skip_special=False) == text


def test_special_ids_are_distinct_and_unknown_ones_raise(tokenizer):
    ids = [tokenizer.token_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(512 - len(SPECIAL_TOKENS), 512))
    with pytest.raises(KeyError):
        tokenizer.token_id("<|tool|>")


def test_forbidden_ids(tokenizer):
    vision = {tokenizer.token_id(token) for token in tokenizers.VISION_TOKENS}
    assert set(tokenizer.forbidden_ids(520)) == {0, *vision, *range(512, 520)}
    assert tokenizer.token_id("<|im_end|>") not in tokenizer.forbidden_ids(520)


def test_sampled_garbage_decodes(tokenizer):
    """Whatever ids come out of a sampler, decoding gives text: a lone half of a byte and an unknown
    row give nothing or U+FFFD.
    """
    half = tokenizer.vocab_size - len(SPECIAL_TOKENS) - 16
    assert tokenizer.decode([half + 15]) == ""
    assert tokenizer.decode([half + 15, half + 15]) == "\ufffd"
    assert tokenizer.decode([0, 9999]) == ""


def test_training_is_deterministic_and_survives_disk_and_pickle(tokenizer, tmp_path):
    again = train_sentencepiece(synthetic.tokenizer_texts(500, seed=0), 512, synthetic.words())
    tokenizer.save(tmp_path)
    again.save(tmp_path / "again")
    assert (tmp_path / tokenizers.MODEL_FILE).read_bytes() == (
        tmp_path / "again" / tokenizers.MODEL_FILE
    ).read_bytes()
    response = synthetic.chart_spec(0, 0).response()
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, SentencePieceTokenizer)
    assert (
        loaded.encode(response)
        == tokenizer.encode(response)
        == pickle.loads(pickle.dumps(tokenizer)).encode(response)
    )


def test_lone_surrogate_is_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\udc80b")) == "a\ufffd\ufffd\ufffdb"


def test_training_rejects_special_tokens_in_texts():
    with pytest.raises(ValueError, match="special token"):
        train_sentencepiece(["a <|im_end|> b"], 512)


def test_missing_model_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        SentencePieceTokenizer(tmp_path)


def test_pretrained(pretrained_dir, tmp_path):
    tokenizer = load_tokenizer(pretrained_dir)
    assert isinstance(tokenizer, PretrainedTokenizer)
    for text in HARD_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    text = "<|im_start|>user\nhi , there .<|im_end|>"
    assert tokenizer.encode(text)[0] == tokenizer.token_id("<|im_start|>")
    assert tokenizer.decode(tokenizer.encode(text)) == "user\nhi , there ."
    vision = {tokenizer.token_id(token) for token in tokenizers.VISION_TOKENS}
    assert set(tokenizer.forbidden_ids(tokenizer.vocab_size + 2)) == vision | {
        tokenizer.vocab_size,
        tokenizer.vocab_size + 1,
    }
    assert tokenizer.decode([tokenizer.vocab_size + 1]) == ""
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").encode(text) == tokenizer.encode(text)


def test_pretrained_of_another_family_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"lacks the special token '<\|endoftext\|>'"):
        load_tokenizer(tmp_path)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"tokenizer.json": LFS}, "tokenizer.json: a git-lfs pointer"),
        ({"tokenizer_config.json": LFS}, "tokenizer_config.json: a git-lfs pointer"),
        ({"merges.txt": LFS}, "merges.txt: a git-lfs pointer"),
        ({"tokenizer.json": "<!doctype html>"}, "tokenizer.json: a web page"),
        ({"tokenizer.json": ""}, "tokenizer.json: an empty file"),
        ({"tokenizer.json": "{"}, "the tokenizer cannot be read"),
        ({"tokenizer.model": LFS}, "tokenizer.model: a git-lfs pointer"),
        ({"tokenizer.json": None}, "no tokenizer .*copy these files from the published model"),
    ],
)
def test_tokenizer_files_that_are_not_what_their_name_says(
    pretrained_dir, tmp_path, damage, message
):
    directory = shutil.copytree(pretrained_dir, tmp_path / "odd")
    for name, text in damage.items():
        (directory / name).unlink(missing_ok=True)
        if text is not None:
            (directory / name).write_text(text)
    with pytest.raises((CheckpointError, FileNotFoundError), match=message) as refusal:
        load_tokenizer(directory)
    assert str(directory) in str(refusal.value) and "\n" not in str(refusal.value)


def test_more_ids_than_the_model_has_rows_are_refused_with_both_sizes(
    tokenizer, pretrained_dir, tmp_path
):
    tokenizer.save(tmp_path)
    for directory in (tmp_path, pretrained_dir):
        size = load_tokenizer(directory).vocab_size
        assert load_tokenizer(directory, size).vocab_size == size
        with pytest.raises(CheckpointError, match=f"has {size} ids, .* has {size - 1} rows: use"):
            load_tokenizer(directory, size - 1)


def test_holes_between_ids_are_counted_and_never_sampled(pretrained_dir, tmp_path):
    """An added token far behind the others: the table needs a row for it, not one per token."""
    directory = shutil.copytree(pretrained_dir, tmp_path / "holes")
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    last = load_tokenizer(directory).vocab_size
    token = dict(content["added_tokens"][-1]) | {"id": last + 5, "content": "<|late|>"}
    content["added_tokens"].append(token)
    content["model"]["vocab"]["<|late|>"] = last + 5
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.vocab_size == last + 6
    holes = set(range(last, last + 5))
    assert holes < set(tokenizer.forbidden_ids(last + 6)) and tokenizer.decode(holes) == ""
    assert last + 5 not in tokenizer.forbidden_ids(last + 6)
