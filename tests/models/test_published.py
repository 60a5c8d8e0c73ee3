"""config.json of others: what is read, and what is refused with its field, value and remedy."""

import dataclasses
import json

import pytest

from mmrecoder_jax.models.config import VisionConfig, preset
from mmrecoder_jax.models.files import CheckpointError
from mmrecoder_jax.models.published import load_config, published_config
from tests.models.parity import CONFIG

FLAT = json.loads(json.dumps(published_config(CONFIG, "bfloat16")))
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"
TEXT = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size", "rms_norm_eps", "hidden_act"),
)


def nested(**text):
    """FLAT as transformers 5 writes it."""
    rope = {
        "rope_type": "default",
        "rope_theta": FLAT["rope_theta"],
        "mrope_section": FLAT["rope_scaling"]["mrope_section"],
    }
    part = {name: FLAT[name] for name in TEXT} | {
        "model_type": "qwen2_5_vl_text",
        "rope_parameters": rope,
        "layer_types": ["full_attention"] * CONFIG.num_layers,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    vision = FLAT["vision_config"] | {
        "model_type": "qwen2_5_vl_vision",
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
    }
    return {
        "architectures": FLAT["architectures"],
        "model_type": "qwen2_5_vl",
        "text_config": part | text,
        "vision_config": vision,
    }


def flat(**changes):
    return FLAT | changes


def vision(**changes):
    return FLAT | {"vision_config": FLAT["vision_config"] | changes}


def rope(**changes):
    return FLAT | {"rope_scaling": FLAT["rope_scaling"] | changes}


def without(name, section=None):
    changed = json.loads(json.dumps(FLAT))
    del (changed[section] if section else changed)[name]
    return changed


def written(directory, config):
    text = config if isinstance(config, str) else json.dumps(config)
    (directory / "config.json").write_text(text, encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    "config",
    [
        FLAT,
        nested(),
        nested(tie_word_embeddings=None),
        flat(text_config=None),
        flat(architectures=None),
        flat(sliding_window=32768, max_window_layers=28, quantization_config=None),
        flat(text_config={"hidden_size": CONFIG.hidden_size}, torch_dtype=None),
        rope(type="default", rope_type="default"),
        vision(layer_types=None, in_chans=3),
        "\ufeff" + json.dumps(FLAT),
    ],
)
def test_the_forms_in_which_the_same_sizes_are_published(tmp_path, config):
    assert load_config(written(tmp_path, config)) == dataclasses.replace(
        CONFIG, dtype="bfloat16", remat="full"
    )


PUBLISHED_IMAGES = {  # the numbers of the published preprocessor_config.json
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
IMAGES_OF_OTHERS = [
    ({"image_mean": [0.5, 0.5, 0.5]}, r"image_mean is \[0.5, 0.5, 0.5\]; ours is \[0.48"),
    ({"image_std": [1.0]}, r"image_std is \[1.0\]; ours"),
    ({"image_std": "clip"}, 'image_std is "clip"; ours'),
    ({"rescale_factor": 1.0}, "rescale_factor is 1.0; ours"),
    ({"do_normalize": False}, "do_normalize is false; this model has true only"),
    ({"do_pad": True}, "do_pad is true; this model has false only"),
    ({"resample": 2}, "resample is 2; this model has 3 only"),
    ({"patch_size": 16}, "patch_size is 16; this model has 14 only"),
    ({"merge_size": 1}, "merge_size is 1; this model has 2 only"),
]


def with_images(directory, file, fields):
    """A directory of the published sizes with this processor."""
    sizes = written(directory, published_config(preset("3b"), "bfloat16"))
    nested = file == "processor_config.json"
    (sizes / file).write_text(json.dumps({"image_processor": fields} if nested else fields))
    return sizes


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("fields, message", [({}, ""), *IMAGES_OF_OTHERS])
def test_images_are_made_ready_as_the_model_wants_or_it_is_refused(tmp_path, file, fields, message):
    directory = with_images(tmp_path, file, PUBLISHED_IMAGES | fields)
    if not message:
        assert load_config(directory) == preset("3b")
        return
    with pytest.raises(CheckpointError, match=f"{file}: (image_processor: )?{message}") as refusal:
        load_config(directory)
    assert "\n" not in str(refusal.value)


def test_a_damaged_file_of_the_processor_is_refused(tmp_path):
    directory = with_images(tmp_path, "preprocessor_config.json", {})
    (directory / "preprocessor_config.json").write_text(LFS)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: a git-lfs pointer"):
        load_config(directory)


def test_a_size_without_a_preset_is_read(tmp_path):
    """Everything but the switches comes from the file."""
    sizes = dataclasses.replace(preset("3b"), num_layers=7, intermediate_size=1000)
    assert load_config(written(tmp_path, published_config(sizes, "bfloat16"))) == sizes


@pytest.mark.parametrize("where", ["top", "text"])
def test_embeddings_are_tied_where_either_place_says_so(tmp_path, where):
    config = nested(tie_word_embeddings=where == "text")
    config["tie_word_embeddings"] = where == "top"
    assert load_config(written(tmp_path, config)).tie_word_embeddings


WHOLE = "must be a positive whole number"
REFUSED = [
    # the file
    (LFS, "config.json: a git-lfs pointer.*`git lfs pull`"),
    ("<!DOCTYPE html><html>", "config.json: a web page"),
    ("  <html>", "config.json: a web page"),
    ('<?xml version="1.0"?><Error>', "config.json: an XML answer"),
    ("", "config.json: an empty file"),
    ("[]", r"config.json: holds \[\], a JSON object"),
    ("null", "config.json: holds null"),
    (json.dumps(FLAT)[:200], "config.json: no JSON, or cut short"),
    ("[" * 100_000, "config.json: JSON that cannot be read"),
    # another model
    (flat(model_type="llama"), 'model_type is "llama"; only .qwen2_5_vl. is read'),
    (flat(model_type=None), "model_type is null"),
    (
        flat(architectures=["Qwen2_5_VLForSequenceClassification"]),
        "architectures is .*SequenceClassification",
    ),
    (flat(architectures="Qwen2_5_VLForConditionalGeneration"), "architectures is"),
    (nested(model_type="qwen3_text"), 'text_config has model_type "qwen3_text"'),
    (vision(model_type="siglip"), 'vision_config has model_type "siglip"'),
    # sections
    (flat(text_config=[1]), r"text_config is \[1\], but must be an object"),
    (flat(vision_config=None), "vision_config is null, but must be an object"),
    (without("vision_config"), "vision_config is missing, but must be an object"),
    (flat(vision_config="large"), 'vision_config is "large", but'),
    (flat(rope_scaling=None), "mrope_section is missing"),
    (flat(rope_scaling="mrope"), 'rope_scaling is "mrope", but must be an object'),
    # fields
    (without("hidden_size"), f"hidden_size is missing, but {WHOLE}"),
    (flat(hidden_size=None), f"hidden_size is null, but {WHOLE}"),
    (flat(hidden_size="48"), f'hidden_size is "48", but {WHOLE}'),
    (flat(hidden_size=48.0), f"hidden_size is 48.0, but {WHOLE}"),
    (flat(num_hidden_layers=True), f"num_hidden_layers is true, but {WHOLE}"),
    (flat(num_attention_heads=0), f"num_attention_heads is 0, but {WHOLE}"),
    (flat(hidden_size=10**30), f"hidden_size is 1{'0' * 30}, but {WHOLE}"),
    (flat(vocab_size=-5), f"vocab_size is -5, but {WHOLE}"),
    (flat(rms_norm_eps="1e-6"), 'rms_norm_eps is "1e-6", but must be a positive number'),
    (without("rms_norm_eps"), "rms_norm_eps is missing, but must be a positive number"),
    (flat(rope_theta=float("nan")), "rope_theta is NaN, but must be a positive number"),
    (without("rope_theta"), "rope_theta is null, but must be a positive number"),
    (flat(tie_word_embeddings="false"), 'tie_word_embeddings is "false", but must be true or'),
    (rope(mrope_section=[16, "24", 24]), r"mrope_section is \[16, .24., 24\], but must be a list"),
    (rope(mrope_section=[1, 2]), r"mrope_section is \[1, 2\], but must have three"),
    (rope(mrope_section=[1, 1, 1]), r"config.json: mrope_section \(1, 1, 1\) must sum to half"),
    (without("fullatt_block_indexes", "vision_config"), "fullatt_block_indexes is missing"),
    (vision(fullatt_block_indexes=3), "fullatt_block_indexes is 3, but must be a list"),
    (vision(fullatt_block_indexes=[]), r"fullatt_block_indexes is \[\], but must be a list"),
    (vision(fullatt_block_indexes=[0, 3]), "config.json: fullatt_block_indexes.*equal groups"),
    (without("depth", "vision_config"), f"vision_config: depth is missing, but {WHOLE}"),
    (vision(patch_size=[14, 14]), rf"patch_size is \[14, 14\], but {WHOLE}"),
    # sizes that do not fit together
    (flat(num_attention_heads=5), "num_attention_heads is 5, which does not divide hidden_size 48"),
    (flat(num_key_value_heads=3), "config.json: num_kv_heads=3 must divide num_heads=4"),
    (flat(head_dim=16), "head_dim is 16; .* = 12 only"),
    (vision(num_heads=3), "config.json: vision num_heads=3 must divide hidden_size=32"),
    (vision(out_hidden_size=64), "config.json: vision.out_hidden_size=64 must equal"),
    (vision(window_size=100), "window_size=100 must be a multiple of .* = 28"),
    # what the model does not compute
    (flat(hidden_act="relu"), 'hidden_act is "relu"; this model has "silu" only'),
    (vision(hidden_act="gelu"), 'vision_config: hidden_act is "gelu"'),
    (flat(use_sliding_window=True), "use_sliding_window is true"),
    (nested(layer_types=["full_attention", "sliding_attention"]), "layer_types is .*sliding_att"),
    (nested(layer_types="sliding"), 'layer_types is "sliding"'),
    (vision(layer_types=["linear_attention"]), "vision_config: layer_types is"),
    (vision(rope_theta=1e6), "vision_config: rope_theta is 1000000.0; this model has 10000.0"),
    (vision(rope_parameters={"rope_theta": 5}), "rope_parameters: rope_theta is 5"),
    (vision(rope_parameters={"rope_type": "yarn"}), 'rope_type is "yarn"'),
    (vision(rms_norm_eps=1e-5), "vision_config: rms_norm_eps is 1e-05"),
    (vision(in_channels=4), "vision_config: in_channels is 4; this model has 3"),
    (rope(type="yarn", factor=4.0), 'rope_scaling: type is "yarn"; this model has default, mrope'),
    (rope(rope_type="linear", factor=2.0), 'rope_scaling: rope_type is "linear"'),
    (rope(rope_type="dynamic"), 'rope_type is "dynamic"'),
    (rope(mrope_interleaved=True), "mrope_interleaved is true"),
    (rope(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (nested(rope_parameters={"rope_type": "yarn"}), 'rope_parameters: rope_type is "yarn"'),
    (flat(rope_parameters={"rope_type": "llama3"}), 'rope_parameters: rope_type is "llama3"'),
    # quantised
    (flat(quantization_config={"quant_method": "awq"}), r'quantised \("awq"\)'),
    (flat(quantization_config={"quant_method": "gptq"}), r'quantised \("gptq"\)'),
    (flat(quantization_config={"load_in_4bit": True}), r"quantised \(.*load_in_4bit"),
    (flat(quantization_config="fp8"), r'quantised \("fp8"\)'),
    (nested(quantization_config={"quant_method": "fp8"}), r'quantised \("fp8"\)'),
    (flat(compression_config={"quant_method": "compressed-tensors"}), "compression_config says"),
]


@pytest.mark.parametrize("config, message", REFUSED)
def test_what_is_refused_in_config_json(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_config(written(tmp_path, config))
    text = str(refusal.value)
    assert text.startswith(str(tmp_path / "config.json")) and "\n" not in text


def test_text_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(json.dumps(FLAT).encode("utf-16"))
    with pytest.raises(CheckpointError, match=r"config\.json: no UTF-8 text"):
        load_config(tmp_path)


def a_file(directory):
    path = directory / "model.safetensors"
    path.write_text("x")
    return path


def a_cache(directory):
    below = directory / "snapshots" / "0123abc"
    below.mkdir(parents=True)
    return written(below, FLAT) and directory


def a_broken_link(directory):
    (directory / "config.json").symlink_to("../../blobs/0123abc")
    return directory


def a_directory_as_file(directory):
    (directory / "config.json").mkdir()
    return directory


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda d: d / "Qwen" / "Qwen2.5-VL-7B-Instruct", "no such directory.*hf download"),
        (lambda d: d, "config.json: no such file"),
        (a_file, "model.safetensors: a file; give the directory"),
        (a_cache, "there is one in snapshots/0123abc: give that directory"),
        (a_broken_link, "a link to ../../blobs/0123abc, which is missing"),
        (a_directory_as_file, "config.json: a directory where a file should be"),
    ],
)
def test_directories_that_hold_no_model(tmp_path, make, message):
    with pytest.raises(FileNotFoundError, match=message) as refusal:
        load_config(make(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("beside_weights", [False, True])
@pytest.mark.parametrize(
    "files, base",
    [
        ({"adapter_config.json": '{"base_model_name_or_path": "Qwen/7B"}'}, '"Qwen/7B"'),
        ({"adapter_config.json": LFS}, "null"),
        ({"adapter_model.safetensors": ""}, "null"),
        ({"adapter_model.bin": "x"}, "null"),
    ],
)
def test_adapters_are_not_taken_for_a_model(tmp_path, files, base, beside_weights):
    if beside_weights:
        written(tmp_path, FLAT)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    message = f"{next(iter(files))}: adapters of the base model {base}.*merge_and_unload"
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize("indexes", [(), (0, 3), (1, 2), (3, 1), (1,)])
def test_full_attention_layers_that_end_no_equal_groups_are_refused(indexes):
    with pytest.raises(ValueError, match="must end equal groups"):
        dataclasses.replace(CONFIG.vision, fullatt_block_indexes=indexes)
    assert isinstance(dataclasses.replace(CONFIG.vision, fullatt_block_indexes=(3,)), VisionConfig)
