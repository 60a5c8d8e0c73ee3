"""Sizes of Qwen2.5-VL. Free of NumPy and JAX, so that data code can read them.

Dimension letters in every docstring and shape annotation of this project; each has one meaning:

    B  batch rows             H  heads                       I  images
    L  length in tokens       K  kv heads                    W  windows per image
    D  embed                  F  features of a head          N  patches per window
    V  vocab                  S  cache slots, or keys        C  values per patch
    P  prompts                R  tokens of a response        U  visual tokens of a batch
    G  group                  M  micro-batches
    T  turns

A dimension without a letter is written as a word: `[height, width, 3]`, `[layers, B, K, S, F]`.
"""

import dataclasses
import enum


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision transformer: attention in windows, full in `fullatt_block_indexes`, 2x2 merger.

    Field names are those of the published `config.json` (`vision_config`).
    """

    hidden_size: int
    depth: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...]
    patch_size: int = 14
    temporal_patch_size: int = 2
    in_channels: int = 3
    spatial_merge_size: int = 2
    window_size: int = 112

    def __post_init__(self) -> None:
        cell = self.patch_size * self.spatial_merge_size
        if self.window_size % cell:
            raise ValueError(
                f"window_size={self.window_size} must be a multiple of patch_size x "
                f"spatial_merge_size = {cell}: windows consist of whole merged cells"
            )
        if self.hidden_size % (4 * self.num_heads):  # rotary angles: rows and columns, in pairs
            raise ValueError(
                f"vision num_heads={self.num_heads} must divide hidden_size={self.hidden_size} "
                "into heads whose size is a multiple of 4"
            )
        groups = len(self.fullatt_block_indexes)
        ends = tuple((i + 1) * self.depth // groups - 1 for i in range(groups))
        if not groups or self.depth % groups or self.fullatt_block_indexes != ends:
            raise ValueError(
                f"fullatt_block_indexes={self.fullatt_block_indexes} of depth={self.depth}: "
                "full attention must end equal groups of layers"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def group_layers(self) -> int:
        """Layers per group: some with windows, then one with full attention."""
        return self.fullatt_block_indexes[0] + 1

    @property
    def window_patches(self) -> int:
        """N: patches per window."""
        return (self.window_size // self.patch_size) ** 2

    @property
    def merge_patches(self) -> int:
        """How many patches become one visual token."""
        return self.spatial_merge_size**2

    @property
    def patch_dim(self) -> int:
        """C: values per patch; the two (equal) temporal slices of a still image count once."""
        return self.in_channels * self.patch_size**2


MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, for each channel
STD = (0.26862954, 0.26130258, 0.27577711)
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the decoder.

    Attributes:
      rank: 0 is no adapters.
      alpha: `alpha / rank` scales what an adapter adds.
      targets: the matmuls that get one.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank}: use 0 for none, or a positive rank")
        if not self.targets or set(self.targets) - set(LORA_TARGETS):
            raise ValueError(f"lora.targets={self.targets}: choose from {', '.join(LORA_TARGETS)}")

    @property
    def scale(self) -> float:
        """What the product of an adapter's two matrices is multiplied by."""
        return self.alpha / self.rank


class Remat(enum.StrEnum):
    """What the backward pass of a layer recomputes."""

    NONE = "none"
    FULL = "full"
    DOTS = "dots"  # everything but the results of matmuls


class Kernel(enum.StrEnum):
    """What computes attention; see `attention.choose`."""

    AUTO = "auto"  # by platform
    XLA = "xla"
    SPLASH = "splash"
    CUDNN = "cudnn"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Qwen2.5-VL sized by numbers alone: `tiny` and `72b` are presets of one architecture.

    Attributes (of those that are ours, not the published architecture's):
      remat: a value of `Remat`.
      attention: a value of `Kernel`.
      scan_unroll: layers per step of the layer scan; the layer count unrolls it completely.
      param_dtype: type in which parameters are kept.
      dtype: type of compute.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vision: VisionConfig
    head_dim: int = 128
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    remat: str = "full"
    attention: str = "auto"
    scan_unroll: int = 1
    param_dtype: str = "float32"
    dtype: str = "bfloat16"
    lora: LoraConfig = LoraConfig()

    def __post_init__(self) -> None:
        if sum(self.mrope_section) * 2 != self.head_dim:
            raise ValueError(
                f"mrope_section {self.mrope_section} must sum to half of head_dim={self.head_dim}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}"
            )
        if self.vision.out_hidden_size != self.hidden_size:
            raise ValueError(
                f"vision.out_hidden_size={self.vision.out_hidden_size} must equal "
                f"hidden_size={self.hidden_size}"
            )
        if self.remat not in set(Remat):
            raise ValueError(f"remat={self.remat!r}: use 'none', 'full' or 'dots'")
        if self.attention not in set(Kernel):
            raise ValueError(
                f"attention={self.attention!r}: use 'auto', 'xla', 'splash' or 'cudnn'"
            )


def _qwen_vision(out_hidden_size: int, intermediate_size: int) -> VisionConfig:
    return VisionConfig(
        hidden_size=1280,
        depth=32,
        num_heads=16,
        intermediate_size=intermediate_size,
        out_hidden_size=out_hidden_size,
        fullatt_block_indexes=(7, 15, 23, 31),
    )


# Published config.json values of Qwen2.5-VL-{3B,7B,32B,72B}-Instruct. `tiny` is ours: the same
# architecture with 1 M parameters, small enough to train from scratch on two CPU cores.
PRESETS = {
    "3b": ModelConfig(
        151936, 2048, 36, 16, 2, 11008, _qwen_vision(2048, 3420), tie_word_embeddings=True
    ),
    "7b": ModelConfig(152064, 3584, 28, 28, 4, 18944, _qwen_vision(3584, 3420)),
    "32b": ModelConfig(152064, 5120, 64, 40, 8, 27648, _qwen_vision(5120, 3456)),
    "72b": ModelConfig(152064, 8192, 80, 64, 8, 29568, _qwen_vision(8192, 3456)),
    "tiny": ModelConfig(
        vocab_size=512,
        hidden_size=128,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=320,
        head_dim=32,
        mrope_section=(4, 6, 6),
        rope_theta=1e4,
        tie_word_embeddings=True,
        remat="none",
        scan_unroll=3,
        dtype="float32",
        vision=VisionConfig(
            hidden_size=96,
            depth=2,
            num_heads=4,
            intermediate_size=256,
            out_hidden_size=128,
            fullatt_block_indexes=(1,),
            window_size=56,
        ),
    ),
}


def preset(name: str) -> ModelConfig:
    """The named size; raises a ValueError that lists the names."""
    if name not in PRESETS:
        raise ValueError(
            f"no model preset {name!r}; there are: {', '.join(PRESETS)}, and 'published' for the "
            "sizes that config.init_from brings with it"
        )
    return PRESETS[name]
