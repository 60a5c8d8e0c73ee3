"""Low-rank adapters of the decoder's matmuls (LoRA, arXiv 2106.09685), as leaves of the parameters.

`y = x W + (alpha / rank) (x A) B`: A and B are trained, W stays. `layers.Dense` makes and applies
them; this module finds them in the parameter tree and merges them.

    q_proj/kernel  [layers, D, out]        q_proj/lora_a  [layers, D, rank]
    q_proj/bias    [layers, out]           q_proj/lora_b  [layers, rank, out], zero at first
"""

from typing import Any

import jax.numpy as jnp

from mmrecoder_jax.models.config import LoraConfig


def is_adapter(name: str) -> bool:
    """Whether the leaf at this path belongs to an adapter."""
    return name.endswith(("/lora_a", "/lora_b"))


def merge(params: dict[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """Parameters with adapters -> the same model without them: `W + (alpha / rank) A B`.

    The sum is made in float32 and kept in W's type: adding in bfloat16 would lose small changes.
    """
    merged: dict[str, Any] = {
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
