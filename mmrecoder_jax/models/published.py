"""config.json of published Qwen2.5-VL directories <-> our sizes.

What is read must be exactly what the model does: a field that would change its computation and
that the model does not have (YaRN, a sliding window, quantised weights) is refused, not ignored.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmrecoder_jax.models.config import MEAN, STD, ModelConfig, VisionConfig
from mmrecoder_jax.models.files import CheckpointError, few, read_json, shown

MODEL_TYPE = "qwen2_5_vl"
ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
TOKEN_IDS = {  # of the published tokenizer
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
_TEXT_SIZES = {  # ours -> published
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
}
_VISION_SIZES = tuple(
    field.name
    for field in dataclasses.fields(VisionConfig)
    if field.name != "fullatt_block_indexes"
)
# What the model computes whatever config.json says: another value there is refused.
_TEXT_FIXED = {"hidden_act": "silu", "use_sliding_window": False}
_VISION_FIXED = {"hidden_act": "silu", "rope_theta": 1e4, "rms_norm_eps": 1e-6, "in_channels": 3}
_TEXT_ROPE_TYPES = ("default", "mrope")
_VISION_ROPE_TYPES = ("default", "axial")
# What the processor computes, by the fields of the published image processor. Its bounds on the
# number of pixels are the run's to choose (`processor.min_pixels`, `processor.max_pixels`).
_IMAGE_FIXED = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "do_center_crop": False,
    "do_pad": False,
    "resample": 3,  # Pillow's number of bicubic
}
_IMAGE_NUMBERS = {"image_mean": MEAN, "image_std": STD, "rescale_factor": (1 / 255,)}
_IMAGE_SIZES = {  # published -> ours
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "temporal_patch_size": "temporal_patch_size",
}
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def load_config(directory: str | pathlib.Path) -> ModelConfig:
    """The sizes in a published directory's config.json.

    Raises:
      FileNotFoundError: there is no such directory, or no config.json in it.
      CheckpointError: see `read_config`; or the directory holds adapters, or its model wants images
        made ready in another way than ours.
    """
    directory = pathlib.Path(directory)
    _check_directory(directory)
    config = read_config(directory / "config.json")
    for path in (directory / "preprocessor_config.json", directory / "processor_config.json"):
        if path.exists() or path.is_symlink():
            _check_images(_Section(str(path), read_json(path)), config.vision)
    return config


def read_config(path: pathlib.Path) -> ModelConfig:
    """The sizes in a file like config.json.

    Both forms are read: the flat one of the hub, and the one of transformers 5, where the decoder's
    fields are in `text_config`.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: the architecture is another one, has a feature that this model lacks, or a
        field is missing or has a wrong type or value.
    """
    whole = _Section(str(path), read_json(path))
    _check_architecture(whole)
    text = _Section(str(path), whole.fields | whole.section("text_config", needed=False).fields)
    vision = whole.section("vision_config")
    for part in (whole, text, vision):
        _check_not_quantised(part)
    for part, fixed, rope_types in (
        (text, _TEXT_FIXED, _TEXT_ROPE_TYPES),
        (vision, _VISION_FIXED, _VISION_ROPE_TYPES),
    ):
        part.check_fixed(fixed)
        _check_layer_types(part)
        _check_rope(part, rope_types)
    _check_head_dim(text)
    try:
        return _model(text, vision, tied=_tied(whole, text))
    except CheckpointError:
        raise
    except ValueError as error:  # sizes that do not fit together
        raise CheckpointError(f"{path}: {error}") from error


def published_config(
    config: ModelConfig, dtype: str, token_ids: Mapping[str, int] = TOKEN_IDS
) -> dict:
    """The config.json of this model, in the flat form of the hub.

    Raises:
      ValueError: sizes that the published architecture cannot have.
    """
    if config.head_dim * config.num_heads != config.hidden_size:
        raise ValueError(
            "published models have head_dim = hidden_size / num_heads; "
            f"this one has {config.head_dim} x {config.num_heads}"
        )
    vision = dataclasses.asdict(config.vision) | {
        "model_type": MODEL_TYPE,
        "hidden_act": "silu",
        "tokens_per_second": 2,
    }
    vision |= {
        "in_chans": config.vision.in_channels,
        "spatial_patch_size": config.vision.patch_size,
    }
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **token_ids,
        **{theirs: getattr(config, ours) for ours, theirs in _TEXT_SIZES.items()},
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(config.mrope_section)},
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_sliding_window": False,
        "torch_dtype": dtype,
        "vision_config": vision,
    }


@dataclasses.dataclass(frozen=True)
class _Section:
    """An object of config.json, and where it is: `DIR/config.json` or `...: vision_config`."""

    where: str
    fields: dict[str, Any]

    def error(self, name: str, problem: str) -> CheckpointError:
        """The refusal of a field, to be raised."""
        return CheckpointError(f"{self.where}: {name} {problem}")

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value, or the default where it is missing or null."""
        value = self.fields.get(name)
        return default if value is None else value

    def section(self, name: str, needed: bool = True) -> "_Section":
        """The object in this field; an empty one where it is missing or null and not needed."""
        value = self.fields.get(name)
        if value is None and not needed:
            return _Section(f"{self.where}: {name}", {})
        if not isinstance(value, dict):
            raise self.error(name, f"{self._is(name)}, but must be an object; {_COPY}")
        return _Section(f"{self.where}: {name}", value)

    def size(self, name: str) -> int:
        """A positive whole number that arrays can have as a size."""
        value = self.fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self.error(
                name, f"{self._is(name)}, but must be a positive whole number; {_COPY}"
            )
        return value

    def number(self, name: str) -> float:
        """A positive finite number."""
        value = self.fields.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return float(value)
        raise self.error(name, f"{self._is(name)}, but must be a positive number; {_COPY}")

    def sizes(self, name: str, least: int) -> tuple[int, ...]:
        """A list of whole numbers, each at least `least`."""
        value = self.fields.get(name)
        good = isinstance(value, list) and all(
            type(item) is int and item >= least for item in value
        )
        if not good or not value:
            raise self.error(
                name, f"{self._is(name)}, but must be a list of whole numbers; {_COPY}"
            )
        return tuple(value)

    def flag(self, name: str) -> bool:
        """True or false; false where it is missing or null."""
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise self.error(name, f"{self._is(name)}, but must be true or false")
        return value

    def check_fixed(self, fixed: Mapping[str, Any]) -> None:
        """Raises CheckpointError where a field has another value than the model computes with."""
        for name, value in fixed.items():
            if self.get(name, value) != value:
                raise self.error(
                    name,
                    f"{self._is(name)}; this model has {shown(value)} only, and would compute "
                    "something else: use a model without that change",
                )

    def _is(self, name: str) -> str:
        return f"is {shown(self.fields[name])}" if name in self.fields else "is missing"


_COPY = "copy config.json from the published model again"


def _model(text: _Section, vision: _Section, tied: bool) -> ModelConfig:
    """Raises CheckpointError or ValueError."""
    rope = _rope(text)
    # defaults of the published class; the other sizes have none that fits a published model
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(VisionConfig)
        if field.default is not dataclasses.MISSING
    }
    tower = _Section(vision.where, defaults | vision.fields)
    section = rope.sizes("mrope_section", 1)
    if len(section) != 3:
        raise rope.error("mrope_section", f"is {list(section)}, but must have three sizes; {_COPY}")
    sizes: dict[str, Any] = {ours: text.size(theirs) for ours, theirs in _TEXT_SIZES.items()}
    return ModelConfig(
        **sizes,
        rms_norm_eps=text.number("rms_norm_eps"),
        vision=VisionConfig(
            **{name: tower.size(name) for name in _VISION_SIZES},
            fullatt_block_indexes=vision.sizes("fullatt_block_indexes", 0),
        ),
        head_dim=sizes["hidden_size"] // sizes["num_heads"],
        rope_theta=rope.number("rope_theta"),
        mrope_section=(section[0], section[1], section[2]),
        tie_word_embeddings=tied,
    )


def _tied(whole: _Section, text: _Section) -> bool:
    """As transformers 5 decides: whichever of the two places says so."""
    return whole.flag("tie_word_embeddings") or text.flag("tie_word_embeddings")


def _rope(part: _Section) -> _Section:
    """The rotary fields: `rope_scaling` on the hub, `rope_parameters` in transformers 5."""
    rope = {"rope_theta": part.fields.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        rope |= part.section(name, needed=False).fields
    return _Section(f"{part.where}: rope_scaling", rope)


def _check_rope(part: _Section, known: tuple[str, ...]) -> None:
    """Refuses another computation of the angles: silently ignored, it changes most tokens."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = part.section(name, needed=False)
        for field in ("rope_type", "type"):
            if rope.get(field, known[0]) not in known:
                raise rope.error(
                    field,
                    f"is {shown(rope.fields[field])}; this model has {', '.join(known)} only: use "
                    "the config.json published with the model (YaRN and its like are for contexts "
                    "longer than it was trained on)",
                )
        rope.check_fixed({"partial_rotary_factor": 1, "mrope_interleaved": False})
        if part.where.endswith("vision_config"):
            rope.check_fixed({"rope_theta": _VISION_FIXED["rope_theta"]})
    part.check_fixed({"partial_rotary_factor": 1})


def _check_layer_types(part: _Section) -> None:
    types = part.get("layer_types", [])
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        raise part.error(
            "layer_types",
            f"is {shown(types)}; this model has 'full_attention' only: use a model without sliding "
            "windows",
        )


def _check_images(whole: _Section, vision: VisionConfig) -> None:
    """Refuses a processor that hands other numbers to the model: other weights belong to them."""
    # transformers 5 nests what was a file of its own
    part = whole.section("image_processor", needed=False)
    part = _Section(whole.where, whole.fields) if not part.fields else part
    part.check_fixed(_IMAGE_FIXED)
    part.check_fixed({theirs: getattr(vision, ours) for theirs, ours in _IMAGE_SIZES.items()})
    for name, ours in _IMAGE_NUMBERS.items():
        value = part.get(name, list(ours))
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(x, int | float) for x in numbers) or not np.allclose(
            numbers if len(numbers) == len(ours) else math.nan, ours, rtol=1e-5, atol=0.0
        ):
            raise part.error(
                name,
                f"is {shown(value)}; ours is {shown(list(ours))} only, and the model would see "
                "other colours: use a model fine-tuned with the published processor",
            )


def _check_head_dim(text: _Section) -> None:
    hidden, heads = text.size("hidden_size"), text.size("num_attention_heads")
    if hidden % heads:
        raise text.error(
            "num_attention_heads",
            f"is {heads}, which does not divide hidden_size {hidden}; {_COPY}",
        )
    if text.get("head_dim", hidden // heads) != hidden // heads:
        raise text.error(
            "head_dim",
            f"is {shown(text.fields['head_dim'])}; this architecture has hidden_size / "
            f"num_attention_heads = {hidden // heads} only",
        )


def _check_architecture(whole: _Section) -> None:
    if whole.get("model_type") != MODEL_TYPE:
        raise whole.error(
            "model_type",
            f"is {shown(whole.get('model_type'))}; only {MODEL_TYPE!r} is read: give a Qwen2.5-VL "
            "directory",
        )
    names = whole.get("architectures", [ARCHITECTURE])
    if names != [ARCHITECTURE]:
        raise whole.error(
            "architectures",
            f"is {shown(names)}; only [{ARCHITECTURE!r}] is read: give the directory of the "
            "generating model, not of a reward or embedding model made of it",
        )
    inner = whole.section("text_config", needed=False).get("model_type", MODEL_TYPE)
    if inner not in (MODEL_TYPE, f"{MODEL_TYPE}_text"):
        raise whole.error("text_config", f"has model_type {shown(inner)}; only {MODEL_TYPE!r}")
    inner = whole.section("vision_config").get("model_type", MODEL_TYPE)
    if inner not in (MODEL_TYPE, f"{MODEL_TYPE}_vision"):
        raise whole.error("vision_config", f"has model_type {shown(inner)}; only {MODEL_TYPE!r}")


def _check_not_quantised(part: _Section) -> None:
    for name in ("quantization_config", "compression_config"):
        settings = part.get(name)
        if settings is None:
            continue
        method = settings.get("quant_method", settings) if isinstance(settings, dict) else settings
        raise part.error(
            name,
            f"says that the weights are quantised ({shown(method)}); training needs them in 16 or "
            "32 bits: give the model before quantisation",
        )


def _check_directory(directory: pathlib.Path) -> None:
    """Raises where a directory is not that of a model, with what it is instead."""
    if directory.is_file():
        raise FileNotFoundError(
            f"{directory}: a file; give the directory that holds config.json and the weights"
        )
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory}: no such directory; a model of the hub is downloaded first: "
            "`hf download NAME --local-dir DIR`"
        )
    for name in _ADAPTERS:
        if (directory / name).exists():
            _refuse_adapters(directory / name)
    if not (directory / "config.json").exists() and not (directory / "config.json").is_symlink():
        below = [
            str(path.parent.relative_to(directory))
            for pattern in ("*/config.json", "snapshots/*/config.json")
            for path in directory.glob(pattern)
        ]
        hint = f"; there is one in {few(below)}: give that directory" if below else ""
        raise FileNotFoundError(
            f"{directory / 'config.json'}: no such file, a published model has one"
            f"{hint or '; copy or download it again'}"
        )


def _refuse_adapters(path: pathlib.Path) -> None:
    """Adapters alone have no weights; beside weights, reading those would leave them out."""
    try:
        base = read_json(path.with_name(_ADAPTERS[0])).get("base_model_name_or_path")
    except (CheckpointError, FileNotFoundError):
        base = None
    raise CheckpointError(
        f"{path}: adapters of the base model {shown(base)}, which are not read: merge them (peft: "
        "PeftModel.from_pretrained(base, this directory).merge_and_unload().save_pretrained(out)) "
        "and give `out`, or give the base model's directory"
    )
