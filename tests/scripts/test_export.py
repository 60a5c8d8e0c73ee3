"""The exported directory: what transformers reads gives the logits of the adapted policy, pixels
and ids as ours; errors are lines.
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from mmrecoder_jax.data.pipeline import prompts
from mmrecoder_jax.data.survey import BadRows
from mmrecoder_jax.learner.checkpoint import Checkpoints
from mmrecoder_jax.learner.update import from_params
from mmrecoder_jax.models.config import LoraConfig
from mmrecoder_jax.models.lora import is_adapter, merge
from mmrecoder_jax.models.processor import rope_positions
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL
from mmrecoder_jax.models.tokenizer import load_tokenizer
from mmrecoder_jax.models.trees import join, split
from mmrecoder_jax.models.weights import load_pretrained
from mmrecoder_jax.stage import Stage, build
from tests.models.conversation import picture, stack_images

LORA = LoraConfig(2, 4.0)


def export(*flags):
    command = [sys.executable, "scripts/export.py", *flags]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False
    )


@dataclasses.dataclass
class Exported:
    stage: Stage  # of the adapted policy
    params: dict
    directory: str


@pytest.fixture(scope="module")
def exported(policy, tmp_path_factory) -> Exported:
    """A stage that trained adapters on the untrained policy, exported in float32."""
    base = policy.stage.workdir
    workdir, out = (
        str(tmp_path_factory.mktemp("adapted")),
        str(tmp_path_factory.mktemp("out") / "model"),
    )

    def save(directory, params, saved):
        with Checkpoints(directory, 1, saved) as checkpoints:
            state = from_params(params, optax.sgd(0.1), policy.stage.mesh, 0)
            stream = prompts(policy.charts, 2, policy.stage.processor, BadRows(0), seed=0)
            checkpoints.save(state, iter(stream), {})

    save(base, policy.params, policy.stage.saved)
    config = policy.stage.config.copy_and_resolve_references()
    config.init_from = base
    config.lora.update({"rank": LORA.rank, "alpha": LORA.alpha})
    stage = build(config, workdir)
    stage.write_config()
    rng = np.random.default_rng(0)
    adapters, weights = split(stage.initial_params(), is_adapter)
    params = join(
        weights,
        jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), adapters),
    )
    save(workdir, params, stage.saved)
    done = export(
        f"--workdir={workdir}", f"--out={out}", "--dtype=float32", "--shard_bytes=2000000"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Exported(stage, params, out)


def test_the_directory_is_read_back_as_the_merged_policy(exported):
    files = set(os.listdir(exported.directory))
    assert {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "model.safetensors.index.json",
    } <= files
    assert sum(name.endswith(".safetensors") for name in files) > 1
    m = exported.stage.model.config
    _, params = load_pretrained(
        exported.directory, dtype=m.dtype, remat=m.remat, scan_unroll=m.scan_unroll
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        params,
        merge(exported.params, LORA),
    )
    tokenizer = load_tokenizer(exported.directory)
    text = "<|im_start|>user\nhi<|im_end|>"
    assert tokenizer.encode(text) == exported.stage.tokenizer.encode(text)
    with open(os.path.join(exported.directory, "config.json"), encoding="utf-8") as f:
        published = json.load(f)
    assert published["image_token_id"] == tokenizer.image_pad_id and published[
        "eos_token_id"
    ] == tokenizer.token_id("<|im_end|>")


@pytest.mark.parity
def test_transformers_gives_the_logits_of_the_adapted_policy(exported):
    """On coloured noise: the blank patches of a chart embed to zero but for rounding, which the
    first norm would blow up on both sides.
    """
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLForConditionalGeneration

    from tests.models.image_processor import Qwen2VLImageProcessorPil

    stage, pixels = exported.stage, picture(112, 150, 0)
    prompt, answer = (
        stage.processor.first_prompt("draw", stage.processor.image(pixels)),
        stage.processor.response("x = 1"),
    )
    ids = np.concatenate([prompt.ids, answer])
    arrays, rows = stack_images(list(prompt.images))
    where = np.full(len(ids), -1, np.int32)
    where[ids == stage.tokenizer.image_pad_id] = rows[0]
    positions = rope_positions(ids, prompt.grids, stage.tokenizer.image_pad_id)
    text = [jnp.asarray(x)[None] for x in (ids, positions, np.ones_like(ids), where)]
    pictures = [jnp.asarray(x) for x in arrays]

    @jax.jit
    def logits(params):
        def call(*args, method=None):
            return stage.model.apply({"params": params}, *args, method=method)

        features = call(*pictures, method=Qwen25VL.encode_images)
        hidden = call(*text, features)
        return call(hidden, method=Qwen25VL.logits)

    with jax.default_matmul_precision("highest"):
        ours = np.asarray(logits(exported.params))[0]
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        exported.directory,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    image = Qwen2VLImageProcessorPil.from_pretrained(exported.directory)(
        [Image.fromarray(pixels)], return_tensors="pt"
    )
    tokens = torch.from_numpy(ids[None]).long()
    with torch.no_grad():
        theirs = model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=(tokens == stage.tokenizer.image_pad_id).int(),
            pixel_values=image["pixel_values"],
            image_grid_thw=image["image_grid_thw"],
        ).logits[0]
    assert np.abs(ours).max() > 0.1
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)


def test_errors_are_lines_that_name_the_remedy(exported, policy, tmp_path):
    again = export(f"--workdir={policy.stage.workdir}", f"--out={exported.directory}")
    assert (
        again.returncode == 1
        and "holds a model already" in again.stderr
        and "Traceback" not in again.stderr
    )
    nothing = export(f"--workdir={tmp_path}", f"--out={tmp_path}/out")
    assert (
        nothing.returncode == 1
        and "no work directory of a stage" in nothing.stderr
        and "Traceback" not in nothing.stderr
    )
    unknown = export(f"--workdir={tmp_path}", f"--out={tmp_path}/out", "--dtype=int8")
    assert unknown.returncode == 1 and "bfloat16" in unknown.stderr


def test_help_says_what_it_does():
    shown = export("--help")
    assert (
        "--workdir" in shown.stdout and "transformers" in shown.stdout and "--dtype" in shown.stdout
    )


def test_bfloat16_is_the_default(policy, exported, tmp_path):
    done = export(f"--workdir={exported.stage.workdir}", f"--out={tmp_path}/half")
    assert done.returncode == 0, done.stderr[-2000:]
    with open(tmp_path / "half" / "config.json", encoding="utf-8") as f:
        assert json.load(f)["torch_dtype"] == "bfloat16"
    _, params = load_pretrained(tmp_path / "half")
    for a, b in zip(
        jax.tree.leaves(params), jax.tree.leaves(merge(exported.params, LORA)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-6)
