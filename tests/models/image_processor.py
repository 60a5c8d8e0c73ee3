"""The published image processor on Pillow and NumPy, which transformers has renamed."""

try:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    BLENDS = True  # transparency is blended with white, as ours is
except ModuleNotFoundError:  # an earlier release
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import (
        Qwen2VLImageProcessor as Qwen2VLImageProcessorPil,
    )

    BLENDS = False  # transparency is dropped

__all__ = ["BLENDS", "Qwen2VLImageProcessorPil"]
