"""Text to token ids and back, losslessly, with the special tokens of Qwen's chat template.

There are two kinds. `SentencePieceTokenizer` is for models trained from scratch: a BPE small enough
for the tiny preset. `PretrainedTokenizer` wraps the tokenizer of a published checkpoint.
`load_tokenizer` chooses by the files of a directory.

Ids of a `SentencePieceTokenizer`, in order:

    0 .. n-1     the n pieces of the SentencePiece model (0 is its unknown piece, never produced)
    n .. n+15    the 16 halves of a byte: a character that the pieces do not cover is written as its
                 UTF-8 bytes, two ids each
    n+16 ..      SPECIAL_TOKENS

SentencePiece's own byte fallback would spend 256 of 512 ids on bytes that chart code hardly ever
needs; the halves cost 16.
"""

import abc
import io
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from mmrecoder_jax.models.files import CheckpointError, check_kind

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VISION_TOKENS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MODEL_FILE = "tokenizer.model"
# Files of which a published tokenizer has some; transformers reads whichever are there.
PUBLISHED_FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)

# What turns messages into text, in either of its forms; it belongs to the tokenizer.
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")

# Inside the SentencePiece model these stand for a newline and a space: a real newline would end a
# training sentence, and a piece with a real space at its end is never learned, so that "," and " "
# would stay two tokens in every list.
NEWLINE, SPACE = "\u23ce", "\u2423"
OWN_SPACE = "\u2581"  # what SentencePiece itself makes of a space
BOUNDARY = "\u001f"  # between two pieces that training must not glue; only ever in training text


class ChartTokenizer(abc.ABC):
    """What the rest of the project asks of a tokenizer. Ids are plain ints.

    Attributes:
      vocab_size: how many ids there are; the model's embedding may have more rows.
      eos_ids: ids that end a response.
    """

    vocab_size: int
    pad_id: int
    image_pad_id: int
    eos_ids: tuple[int, ...]

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`.

        The string of a special token becomes that token's id, so text from outside must be made
        plain before (`Processor` does).
        """

    @abc.abstractmethod
    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; ids beyond the tokenizer's vocabulary give nothing."""

    @abc.abstractmethod
    def token_id(self, token: str) -> int:
        """The id of a special token. Raises KeyError for anything else."""

    @abc.abstractmethod
    def save(self, directory: str | os.PathLike) -> None:
        """Writes what `load_tokenizer` needs into the directory, which is made if need be."""

    @abc.abstractmethod
    def forbidden_ids(self, model_vocab_size: int) -> tuple[int, ...]:
        """Ids that must never be sampled: vision tokens, and embedding rows without a token."""

    def _set_chat_ids(self) -> None:
        """Sets the ids that the chat template needs; for the end of `__init__`."""
        self.pad_id = self.token_id("<|endoftext|>")
        self.image_pad_id = self.token_id("<|image_pad|>")
        self.eos_ids = (self.token_id("<|im_end|>"), self.pad_id)

    def _vision_ids(self) -> set[int]:
        return {self.token_id(token) for token in VISION_TOKENS}


class SentencePieceTokenizer(ChartTokenizer):
    """A BPE of SentencePiece plus byte halves plus `SPECIAL_TOKENS`.

    Args:
      model: the directory that holds `tokenizer.model`, that file, or its bytes.

    Raises:
      FileNotFoundError: there is no such file.
    """

    def __init__(self, model: str | os.PathLike | bytes):
        if not isinstance(model, bytes):
            path = Path(model)
            model = (path / MODEL_FILE if path.is_dir() else path).read_bytes()
        self._model = model
        self._load()

    def _load(self) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        self._halves_start = self._pieces.get_piece_size()
        self._special_start = self._halves_start + 16
        self._special = {token: self._special_start + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = self._special_start + len(SPECIAL_TOKENS)
        singles = (self._pieces.id_to_piece(i) for i in range(1, self._halves_start))
        characters = {piece for piece in singles if len(piece) == 1}
        covered = characters - {NEWLINE, SPACE, OWN_SPACE} | {"\n", " "}
        self._covered_runs = re.compile(f"([{re.escape(''.join(sorted(covered)))}]+)")
        self._special_runs = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
        self._set_chat_ids()

    # The data pipeline sends tokenizers to its worker processes; SentencePiece's own object and the
    # compiled expressions are made again there.
    def __getstate__(self) -> dict[str, Any]:
        return {"_model": self._model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = state["_model"]
        self._load()

    def save(self, directory: str | os.PathLike) -> None:
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        temporary = path / f"{MODEL_FILE}.tmp"
        temporary.write_bytes(self._model)
        temporary.replace(path / MODEL_FILE)

    def pieces(self) -> list[str | None]:
        """The text of each id of a piece, in order: the more often merged come first. None for the
        unknown piece, which is never produced.
        """
        names = [self._pieces.id_to_piece(i) for i in range(self._halves_start)]
        return [None, *(_outside(name) for name in names[1:])]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._special_runs.split(text):
            ids.extend([self._special[part]] if part in self._special else self._encode_plain(part))
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        # Odd parts of the split are runs of covered characters, even ones (most often empty) are
        # the characters between them.
        for i, part in enumerate(self._covered_runs.split(text)):
            if i % 2:
                ids.extend(self._pieces.encode(_inside(part)))
            else:
                for byte in part.encode("utf-8", "surrogatepass"):
                    ids.extend((self._halves_start + byte // 16, self._halves_start + byte % 16))
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        text: list[str] = []
        halves: list[int] = []

        def flush() -> None:
            # a half without its partner, which a policy may sample, is dropped
            pairs = zip(halves[::2], halves[1::2], strict=False)
            text.append(bytes(high * 16 + low for high, low in pairs).decode("utf-8", "replace"))
            halves.clear()

        for i in ids:
            if self._halves_start <= i < self._special_start:
                halves.append(i - self._halves_start)
                continue
            flush()
            if 0 < i < self._halves_start:
                text.append(_outside(self._pieces.id_to_piece(int(i))))
            elif self._special_start <= i < self.vocab_size and not skip_special:
                text.append(SPECIAL_TOKENS[i - self._special_start])
        flush()
        return "".join(text)

    def token_id(self, token: str) -> int:
        return self._special[token]

    def forbidden_ids(self, model_vocab_size: int) -> tuple[int, ...]:
        unused = set(range(self.vocab_size, model_vocab_size))
        return tuple(sorted({self._pieces.unk_id()} | self._vision_ids() | unused))


def _inside(text: str) -> str:
    """Text as it is inside the SentencePiece model."""
    return text.replace("\n", NEWLINE).replace(" ", SPACE)


def _outside(piece: str) -> str:
    """A piece of the SentencePiece model as text."""
    return piece.replace(NEWLINE, "\n").replace(SPACE, " ")


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, atoms: Iterable[str] = ()
) -> SentencePieceTokenizer:
    """A BPE trained on `texts`, deterministically.

    Pieces may cross from code into words (`split_by_unicode_script` is off: that halves the length
    of chart code), but not over the edges of `atoms`: a title stays a token of its own, however
    often the same code is beside it. Digits are single tokens.

    Args:
      texts: training texts; how often a text occurs is its weight.
      vocab_size: size of the whole vocabulary, including the byte halves and special tokens.
      atoms: words whose edges no piece crosses.

    Raises:
      ValueError: a text holds a special token or a character reserved for training.
      RuntimeError: `vocab_size` is too small for the characters, or larger than the texts can fill
        (from SentencePiece).
    """
    printable = "".join(map(chr, range(33, 127)))
    # the longest alternative comes first, or "net" would match inside "net sales"
    longest_first = sorted(set(atoms), key=lambda word: (-len(word), word))
    edges = (
        re.compile(r"(?<!\w)(" + "|".join(map(re.escape, longest_first)) + r")(?!\w)")
        if longest_first
        else None
    )
    sentences = []
    for text in texts:
        if any(token in text for token in SPECIAL_TOKENS) or any(
            mark in text for mark in (NEWLINE, SPACE, OWN_SPACE, BOUNDARY)
        ):
            raise ValueError(
                f"training text holds a special token or a reserved character: {text[:80]!r}"
            )
        text = _inside(text)
        sentences.append(edges.sub(rf"{BOUNDARY}\1{BOUNDARY}", text) if edges else text)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size - 16 - len(SPECIAL_TOKENS),
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        split_by_whitespace=False,
        split_by_number=True,
        split_digits=True,
        max_sentencepiece_length=128,
        max_sentence_length=1 << 16,
        required_chars=printable + NEWLINE + SPACE,
        character_coverage=1.0,
        pretokenization_delimiter=BOUNDARY,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,  # more threads, and ties between pairs may fall otherwise
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


class PretrainedTokenizer(ChartTokenizer):
    """The tokenizer of a published checkpoint, through transformers' AutoTokenizer; needs no torch.

    Args:
      source: a directory with the tokenizer's files.

    Raises:
      OSError: the source is no directory with a tokenizer (from transformers).
      KeyError: a token of the chat template is missing: not a Qwen2-VL family tokenizer.
    """

    def __init__(self, source: str | os.PathLike):
        # imported here: it takes seconds, and the tiny model never needs it
        from transformers import AutoTokenizer

        self._source = Path(source)
        self._tokenizer = AutoTokenizer.from_pretrained(source)
        self._special = self._tokenizer.get_added_vocab()
        self._ids = frozenset(self._tokenizer.get_vocab().values())
        self.vocab_size = max(self._ids, default=-1) + 1  # not their number: there may be holes
        self._set_chat_ids()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        known = [int(i) for i in ids if int(i) in self._ids]
        # cleaning up would take the space out of "a , b": ids are the only truth
        text = self._tokenizer.decode(
            known, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # a list only for a batch of sequences
        return text

    def save(self, directory: str | os.PathLike) -> None:
        # Copied as they are: what transformers 5 would write, 4.57 cannot read.
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        for name in (*PUBLISHED_FILES, *TEMPLATE_FILES):
            if (self._source / name).is_file():
                temporary = path / f"{name}.tmp"
                shutil.copyfile(self._source / name, temporary)
                temporary.replace(path / name)

    def token_id(self, token: str) -> int:
        return self._special[token]

    def forbidden_ids(self, model_vocab_size: int) -> tuple[int, ...]:
        return tuple(sorted(self._vision_ids() | (set(range(model_vocab_size)) - self._ids)))


def load_tokenizer(source: str | os.PathLike, rows: int | None = None) -> ChartTokenizer:
    """The tokenizer of a directory.

    A `SentencePieceTokenizer` if the directory has `tokenizer.model`, else a `PretrainedTokenizer`.

    Args:
      rows: of the model's embedding table. JAX does not fault on an id beyond it but reads another
        row, so a larger tokenizer must be refused. None does not check.

    Raises:
      FileNotFoundError: the directory has no tokenizer.
      CheckpointError: a file is not what its name says, the special tokens of the chat template are
        missing, or there are more ids than rows.
    """
    directory = Path(source)
    if (directory / MODEL_FILE).is_file():
        tokenizer: ChartTokenizer = _sentencepiece(directory / MODEL_FILE)
    else:
        tokenizer = _pretrained(directory)
    if rows is not None and tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} ids, the model's embedding has "
            f"{rows} rows: use the tokenizer that was published with the model, or enlarge the "
            "model (transformers: resize_token_embeddings) and save both"
        )
    return tokenizer


def _sentencepiece(path: Path) -> SentencePieceTokenizer:
    check_kind(path)
    try:
        return SentencePieceTokenizer(path)
    except RuntimeError as error:  # SentencePiece's own, for bytes that are no model
        raise CheckpointError(f"{path}: no SentencePiece model; copy the file again") from error


def _pretrained(directory: Path) -> PretrainedTokenizer:
    files = [directory / name for name in PUBLISHED_FILES if (directory / name).exists()]
    for path in files:
        check_kind(path)
    if not any(path.name in ("tokenizer.json", "vocab.json") for path in files):
        raise FileNotFoundError(
            f"{directory}: no tokenizer (tokenizer.json, or vocab.json and merges.txt); copy these "
            "files from the published model"
        )
    try:
        return PretrainedTokenizer(directory)
    except KeyError as error:
        raise CheckpointError(
            f"{directory}: the tokenizer lacks the special token {error.args[0]!r}: it is not of "
            "the Qwen2-VL family; copy the tokenizer's files from the published model"
        ) from error
    except Exception as error:  # whatever transformers and tokenizers raise for damaged files
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{directory}: the tokenizer cannot be read ({type(error).__name__}: {reason}); copy "
            "its files from the published model again"
        ) from error
