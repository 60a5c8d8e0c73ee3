"""The reference (transformers on torch) with the weights and inputs of `parity`; needs torch.

python -m tests.models.reference        # rewrites golden/parity.npz and docs/parity.md
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mmrecoder_jax.models.published import published_config
from mmrecoder_jax.models.weights import from_tensors
from tests.models.conversation import PIXELS, pictures
from tests.models.image_processor import Qwen2VLImageProcessorPil
from tests.models.parity import (
    ATOL,
    CASES,
    CONFIG,
    GOLDEN,
    GRADIENT_RTOL,
    IMAGE_TOKEN,
    NEW,
    Case,
    by_pieces,
    compact,
    gradient_error,
    greedy,
    inputs_of,
    no_features,
    our_gradients,
    our_side,
    packed,
    random_tensors,
    thin,
)


def reference_model(config=CONFIG) -> torch.nn.Module:
    """The reference in float32 with `random_tensors`; refuses a tensor too many or too few."""
    published = Qwen2_5_VLConfig.from_dict(
        published_config(config, "float32", {"image_token_id": IMAGE_TOKEN})
    )
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
    ids, mask = (
        np.zeros((len(segments), longest), np.int64),
        np.zeros((len(segments), longest), np.int64),
    )
    for b, segment in enumerate(segments):
        place = (
            slice(longest - len(segment.ids), longest) if case.left else slice(0, len(segment.ids))
        )
        ids[b, place], mask[b, place] = segment.ids, 1
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
    images = [
        image
        for seed, sizes in enumerate(case.conversations)
        for image in pictures(list(sizes), seed)
    ]
    if images:
        processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]}
        )
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
            out["features"] = model.model.visual(
                inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]
            ).pooler_output.numpy()
    return out


def reference_gradients(model: torch.nn.Module, case: Case) -> dict:
    """What `parity.our_gradients` gives, as a tree of ours; zero where a case has no image."""
    inputs = reference_inputs(case)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    model.zero_grad()
    logps = torch.log_softmax(model(**inputs).logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[
        ..., 0
    ]
    logps[mask[:, 1:] & mask[:, :-1]].mean().backward()
    # No image, no gradient of the tower: ones stand for them, since weights of zeros are refused.
    tensors = {
        name: (torch.ones_like(x) if x.grad is None else x.grad).numpy()
        for name, x in model.named_parameters()
    }
    tree = from_tensors(tensors, CONFIG)
    if "pixel_values" not in inputs:
        tree["visual"] = jax.tree.map(jnp.zeros_like, tree["visual"])
    tree["visual"]["patch_embed"]["proj"]["kernel"] /= (
        2  # both slices get the gradient of their sum
    )
    return tree


def reference_greedy(model: torch.nn.Module, case: Case) -> np.ndarray:
    """`generate` without sampling: the NEW tokens behind each conversation of a left-padded
    case.
    """
    inputs = reference_inputs(case)
    return model.generate(
        **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
    )[:, -NEW:].numpy()


def compare(model: torch.nn.Module, params: dict, case: Case) -> dict[str, float]:
    """Every measure of one case: largest differences, and how many of the continuations' tokens are
    the same.
    """
    theirs = reference_side(model, case)
    arrays, inputs = inputs_of(case)
    features, logits = side(params, arrays, inputs)
    errors = {
        what: float(np.abs(x - theirs[what]).max())
        for what, x in compact(case, features, logits).items()
    }
    shown = no_features() if features is None else features
    cached = compact(case, features, by_pieces(params, shown, inputs))["logits"]
    row, count = packed(case, inputs)
    together = np.asarray(side(params, arrays, row)[1])[0, :count]
    left = dataclasses.replace(case, left=True)
    continued = greedy(params, shown, inputs_of(left)[1])[: len(case.segments)]
    return errors | {
        "cached": float(np.abs(cached - theirs["logits"]).max()),
        "packed": float(np.abs(together - np.concatenate([theirs["logits"]] * 2)).max()),
        "gradients": gradient_error(
            gradients(params, arrays, inputs), reference_gradients(model, case)
        ),
        "greedy": float((continued == reference_greedy(model, left)).mean()),
    }


side, gradients = jax.jit(our_side), jax.jit(our_gradients)

PAGE = """# Parity with the reference implementation

This model is compared with `transformers` {version} on torch: float32 at the highest matmul
precision, random weights (no bias is zero, no norm is one), logits up to {scale:.1f}. The tests
allow {atol:.0e}, and {rtol:.0e} for gradients. `python -m tests.models.reference` writes this page.

- Features, logits, cached and packed: the largest absolute difference.
- Cached: logits of a prompt, of three tokens decoded one by one, and of the next turn's prompt, all
  on one live cache, against the reference's forward pass over whole rows.
- Packed: logits of several rows packed into one, against the reference's separate rows.
- Gradients: of the mean log-probability of the real tokens; the largest relative difference over
  all parameters, by the norms of each tensor.
- Greedy: the share of {new} tokens after each conversation on which `generate` agrees.

| case | features | logits | cached | packed | gradients | greedy |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    model, params = reference_model(), from_tensors(random_tensors(), CONFIG)
    golden, lines = {}, []
    for name, case in CASES.items():
        golden |= {f"{name}/{what}": x for what, x in thin(reference_side(model, case)).items()}
        errors = compare(model, params, case)
        shown = [
            f"{errors[what]:.1e}" if what in errors else ""
            for what in ("features", "logits", "cached", "packed", "gradients")
        ]
        lines.append(f"| {name} | {' | '.join(shown)} | {errors['greedy']:.0%} |\n")
        print(lines[-1], end="", flush=True)
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **golden)
    scale = max(np.abs(x).max() for x in golden.values())
    heading = PAGE.format(
        version=transformers.__version__, scale=scale, new=NEW, atol=ATOL, rtol=GRADIENT_RTOL
    )
    (pathlib.Path(__file__).parents[2] / "docs" / "parity.md").write_text(heading + "".join(lines))


if __name__ == "__main__":
    main()
