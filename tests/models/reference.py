"""The reference implementation (transformers on torch) with the weights and inputs of `parity`. Needs torch.

python -m tests.models.reference        # rewrites golden/parity.npz and docs/parity.md
"""

import pathlib

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmrecoder_jax.models.weights import published_config
from tests.models.conversation import PIXELS, pictures
from tests.models.parity import CASES, CONFIG, GOLDEN, IMAGE_TOKEN, Case, compact, inputs_of, our_side, random_tensors, thin


def reference_model(config=CONFIG) -> torch.nn.Module:
    """The reference in float32 with `random_tensors`; refuses a tensor too many or too few."""
    published = Qwen2_5_VLConfig.from_dict(published_config(config, "float32", IMAGE_TOKEN))
    published._attn_implementation = "eager"
    model = Qwen2_5_VLForConditionalGeneration(published).eval()
    names = {"visual": "model.visual", "model": "model.language_model", "lm_head": "lm_head"}
    state = {}
    for name, x in random_tensors(config).items():
        first, rest = name.split(".", 1)
        state[f"{names[first]}.{rest}"] = torch.from_numpy(x)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


def reference_inputs(case: Case) -> dict[str, torch.Tensor]:
    """The arguments of the reference's forward, images by its own processor."""
    segments = case.segments
    longest = max(len(segment.ids) for segment in segments)
    ids, mask = np.zeros((len(segments), longest), np.int64), np.zeros((len(segments), longest), np.int64)
    for b, segment in enumerate(segments):
        place = slice(longest - len(segment.ids), longest) if case.left else slice(0, len(segment.ids))
        ids[b, place], mask[b, place] = segment.ids, 1
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
    images = [image for seed, sizes in enumerate(case.conversations) for image in pictures(list(sizes), seed)]
    if images:
        processor = Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]})
        read = processor(images, return_tensors="np")
        inputs["pixel_values"] = torch.from_numpy(np.array(read["pixel_values"]))
        inputs["image_grid_thw"] = torch.from_numpy(np.array(read["image_grid_thw"]))
    return inputs


def reference_side(model: torch.nn.Module, case: Case) -> dict[str, np.ndarray]:
    """Features of all images and logits of the real tokens, as `parity.compact` orders them."""
    inputs = reference_inputs(case)
    with torch.no_grad():
        out = {"logits": model(**inputs).logits[inputs["attention_mask"].bool()].numpy()}
        if "pixel_values" in inputs:
            out["features"] = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output.numpy()
    return out


def main() -> None:
    import jax

    from mmrecoder_jax.models.weights import from_tensors

    jax.config.update("jax_default_matmul_precision", "highest")
    model, params = reference_model(), from_tensors(random_tensors(), CONFIG)
    golden, lines = {}, []
    side = jax.jit(our_side)
    for name, case in CASES.items():
        theirs = reference_side(model, case)
        ours = compact(case, *side(params, *inputs_of(case)))
        errors = {what: float(np.abs(ours[what] - theirs[what]).max()) for what in theirs}
        lines.append(f"| {name} | {errors.get('features', 0):.1e} | {errors['logits']:.1e} |")
        golden |= {f"{name}/{what}": x for what, x in thin(theirs).items()}
    scale = max(np.abs(x).max() for x in golden.values())
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **golden)
    page = pathlib.Path(__file__).parents[2] / "docs" / "parity.md"
    page.write_text(
        "# Parity with the reference implementation\n\n"
        "Largest absolute difference to `transformers` on torch, float32, random weights (no zero bias, no unit norm), values up to\n"
        f"{scale:.1f}. The tests allow 2e-5. Written by `python -m tests.models.reference`.\n\n"
        "| case | visual tokens | logits |\n|---|---|---|\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
