"""A policy as a whole Hugging Face directory: what `transformers`, SGLang and vLLM load."""

import json
import pathlib
from collections.abc import Iterable

import numpy as np

from mmrecoder_jax.models.config import MEAN, STD, ModelConfig
from mmrecoder_jax.models.tokenizer import ChartTokenizer
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


def export_policy(
    directory: str | pathlib.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    sizes: ModelConfig,
    tokenizer: ChartTokenizer,
    pixels: tuple[int, int],
    dtype: str,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes config.json, generation_config.json, preprocessor_config.json, sharded safetensors and
    the tokenizer's files.

    Args:
      directory: is made, and must not hold a model yet.
      tensors: of `weights.to_tensors`, in the type `dtype`.
      pixels: least and most pixels of an image after resizing.
      shard_bytes: largest size of a file, about.

    Raises:
      FileExistsError: there is a config.json already.
    """
    directory = pathlib.Path(directory)
    ids = {name: tokenizer.token_id(token) for name, token in TOKENS.items()}
    save_tensors(directory, tensors, sizes, dtype, ids, shard_bytes)
    tokenizer.save(directory)
    files = {
        "generation_config.json": {
            "bos_token_id": ids["bos_token_id"],
            "eos_token_id": list(tokenizer.eos_ids),
            "pad_token_id": tokenizer.pad_id,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "size": {"shortest_edge": pixels[0], "longest_edge": pixels[1]},
            "patch_size": sizes.vision.patch_size,
            "temporal_patch_size": sizes.vision.temporal_patch_size,
            "merge_size": sizes.vision.spatial_merge_size,
            "image_mean": list(MEAN),
            "image_std": list(STD),
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
