"""A policy as a whole Hugging Face directory: what `transformers` (4.57 and 5), SGLang and vLLM
load.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from mmrecoder_jax.models.config import MEAN, STD, ModelConfig
from mmrecoder_jax.models.fast_tokenizer import tokenizer_config, tokenizer_json
from mmrecoder_jax.models.files import read_json
from mmrecoder_jax.models.tokenizer import (
    TEMPLATE_FILES,
    ChartTokenizer,
    SentencePieceTokenizer,
)
from mmrecoder_jax.models.weights import save_tensors

# Fields of config.json, and the tokens that the published models give them.
TOKENS = {
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|vision_pad|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
_SETTINGS = "tokenizer_config.json"
# The turns that `Processor` writes, in Jinja; {system} is the run's own message.
_TEMPLATE = (
    "{system}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def export_policy(
    directory: str | pathlib.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    sizes: ModelConfig,
    tokenizer: ChartTokenizer,
    pixels: tuple[int, int],
    dtype: str,
    shard_bytes: int = 5 * 10**9,
    system: str | None = None,
) -> None:
    """Writes config.json, generation_config.json, preprocessor_config.json, sharded safetensors,
    the tokenizer's files and a chat template.

    Args:
      directory: is made, and must not hold a model yet.
      tensors: of `weights.to_tensors`, in the type `dtype`.
      pixels: least and most pixels of an image after resizing.
      shard_bytes: largest size of a file, about.
      system: the system message of the run, for a tokenizer that brings no chat template.

    Raises:
      FileExistsError: there is a config.json already.
    """
    directory = pathlib.Path(directory)
    ids = {name: tokenizer.token_id(token) for name, token in TOKENS.items()}
    save_tensors(directory, tensors, sizes, dtype, ids, shard_bytes)
    save_tokenizer(directory, tokenizer, system)
    generation = {
        "bos_token_id": ids["bos_token_id"],
        "eos_token_id": list(tokenizer.eos_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    _write(directory / "generation_config.json", generation)
    _write(directory / "preprocessor_config.json", image_settings(sizes, pixels))


def image_settings(sizes: ModelConfig, pixels: tuple[int, int]) -> dict[str, Any]:
    """The content of preprocessor_config.json: how images become patches.

    The bounds stand twice: transformers 5 reads `size`, 4.57 the fields of the hub's own file.
    """
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "size": {"shortest_edge": pixels[0], "longest_edge": pixels[1]},
        "min_pixels": pixels[0],
        "max_pixels": pixels[1],
        "patch_size": sizes.vision.patch_size,
        "temporal_patch_size": sizes.vision.temporal_patch_size,
        "merge_size": sizes.vision.spatial_merge_size,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def save_tokenizer(
    directory: pathlib.Path, tokenizer: ChartTokenizer, system: str | None = None
) -> None:
    """Writes the tokenizer's files as `AutoTokenizer` reads them, with a chat template.

    Those of a published tokenizer are copied. In a work directory of an earlier version they are as
    transformers 5 wrote them, with a list that 4.57 cannot read: it gets the name that both know.
    """
    tokenizer.save(directory)
    settings = directory / _SETTINGS
    if isinstance(tokenizer, SentencePieceTokenizer):
        _write(directory / "tokenizer.json", tokenizer_json(tokenizer), indent=None)
        _write(settings, tokenizer_config())
    fields = read_json(settings) if settings.is_file() else {}
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
        _write(settings, fields)
    brought = any((directory / name).exists() for name in TEMPLATE_FILES)
    if not brought and "chat_template" not in fields:
        (directory / TEMPLATE_FILES[0]).write_text(chat_template(system), encoding="utf-8")


def chat_template(system: str | None) -> str:
    """The Jinja template of the turns that `Processor` writes; a message of the role `system`
    replaces the run's own.
    """
    if system is None:
        return _TEMPLATE.replace("{system}", "")
    own = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
        f"{{{{ {json.dumps(system, ensure_ascii=False)} }}}}<|im_end|>\n{{% endif %}}"
    )
    return _TEMPLATE.replace("{system}", own)


def _write(path: pathlib.Path, content: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
