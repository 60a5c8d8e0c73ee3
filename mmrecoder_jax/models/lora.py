"""Low-rank adapters of the decoder's matmuls (LoRA, arXiv 2106.09685): `y = x W + (alpha / rank) (x
A) B`, trained while W stays.

`layers.Dense` makes and applies them; here is what is done with them as a part of the parameter
tree.

    q_proj: kernel [layers, D, F]   bias [layers, F]   lora_a [layers, D, rank]   lora_b [layers, rank, F], zero at first
"""

from typing import Any

import jax.numpy as jnp

from mmrecoder_jax.models.config import LoraConfig


def is_adapter(name: str) -> bool:
    """Whether the leaf at this path belongs to an adapter."""
    return name.endswith(("/lora_a", "/lora_b"))


def merge(params: dict[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """Parameters with adapters -> the same model without: `W + (alpha / rank) A B`, added in
    float32, kept in W's type.
    """
    merged = {
        key: merge(value, lora) if isinstance(value, dict) else value
        for key, value in params.items()
    }
    if "lora_a" in merged:
        change = jnp.einsum(
            "...dr,...rf->...df", merged.pop("lora_a"), merged.pop("lora_b"), precision="highest"
        )
        kernel = merged["kernel"]
        merged["kernel"] = (kernel.astype(jnp.float32) + lora.scale * change).astype(kernel.dtype)
    return merged
