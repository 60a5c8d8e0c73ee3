"""The exported directory: what transformers (4.57 and 5) and PEFT read gives the logits of the
adapted policy, pixels and ids as ours; errors are lines.

MMRECODER_TRANSFORMERS_4 and MMRECODER_TRANSFORMERS_5 name the Python of a virtual environment with
that release, torch, torchvision and peft; where they do not, what needs them is skipped.
"""

import dataclasses
import functools
import json
import os
import subprocess

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
from mmrecoder_jax.prepare import find_source
from mmrecoder_jax.stage import Stage, build
from tests.commands import ROOT, run_command
from tests.models.conversation import picture, stack_images

LORA = LoraConfig(2, 4.0)


def export(*flags):
    return run_command("export", *flags)


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
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "training_config.json",
        "README.md",
    } <= files
    assert not os.path.exists(f"{exported.directory}.partial")
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


def prompt_of(stage: Stage):
    """The prompt about coloured noise: the blank patches of a chart embed to zero but for rounding,
    which the first norm would blow up on both sides. Its sides are multiples of 28: the processors
    of transformers do not resize to the same last digit as one another.
    """
    image = stage.processor.image(picture(112, 140, 0))
    return stage.processor.first_prompt(stage.config.data.instruction, image)


def our_logits(exported: Exported) -> np.ndarray:
    """Logits [L, V] of the adapted policy behind each token of the prompt."""
    stage, prompt = exported.stage, prompt_of(exported.stage)
    arrays, rows = stack_images(list(prompt.images))
    where = np.full(len(prompt.ids), -1, np.int32)
    where[prompt.ids == stage.tokenizer.image_pad_id] = rows[0]
    positions = rope_positions(prompt.ids, prompt.grids, stage.tokenizer.image_pad_id)
    inputs = (prompt.ids, positions, np.ones_like(prompt.ids), where)
    text = [jnp.asarray(x)[None] for x in inputs]
    pictures = [jnp.asarray(x) for x in arrays]

    @jax.jit
    def logits(params):
        def call(*args, method=None):
            return stage.model.apply({"params": params}, *args, method=method)

        features = call(*pictures, method=Qwen25VL.encode_images)
        hidden = call(*text, features)
        return call(hidden, method=Qwen25VL.logits)

    with jax.default_matmul_precision("highest"):
        return np.asarray(logits(exported.params))[0]


@pytest.fixture(scope="module")
def adapters_alone(exported, tmp_path_factory) -> tuple[str, str]:
    """(the exported weights below the adapters, the adapters as a directory of PEFT)."""
    out = tmp_path_factory.mktemp("peft")
    base, alone = str(out / "base"), str(out / "adapters")
    done = export(
        f"--workdir={exported.stage.config.init_from}", f"--out={base}", "--dtype=float32"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    flags = (f"--workdir={exported.stage.workdir}", "--adapters", "--dtype=float32")
    refused = export(*flags, f"--out={alone}")
    assert refused.returncode == 1 and "give --base=DIR" in refused.stderr
    done = export(*flags, f"--out={alone}", f"--base={base}")
    assert done.returncode == 0, done.stderr[-2000:]
    return base, alone


RELEASES = ("4", "5")  # of transformers


def python_with(release: str) -> str:
    """The Python of another virtual environment, which has this release."""
    variable = f"MMRECODER_TRANSFORMERS_{release}"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no Python of a virtual environment with that release")
    return os.environ[variable]


def opened(python: str, directory: str, exported: Exported, out: str, *adapters: str):
    """What `open_exported` wrote: arrays by name."""
    chart = os.path.join(os.path.dirname(out), "chart.png")
    Image.fromarray(picture(112, 140, 0)).save(chart)
    instruction = exported.stage.config.data.instruction
    script = os.path.join(ROOT, "tests", "models", "open_exported.py")
    done = subprocess.run(
        [python, script, directory, chart, instruction, out, *adapters],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(out)


@pytest.mark.parity
@pytest.mark.parametrize("release", RELEASES)
def test_transformers_opens_the_directory_as_its_card_says(exported, release, tmp_path):
    python = python_with(release)
    theirs = opened(python, exported.directory, exported, str(tmp_path / "out.npz"))
    prompt, ours = prompt_of(exported.stage), our_logits(exported)
    np.testing.assert_array_equal(theirs["ids"], prompt.ids)
    assert theirs["grid"].tolist() == [[1, *(2 * cells for cells in prompt.grids[0])]]
    assert np.abs(ours).max() > 0.1
    np.testing.assert_allclose(ours, theirs["logits"], atol=2e-5)
    assert theirs["answer"][0] == ours[-1].argmax()


@pytest.mark.parity
@pytest.mark.parametrize("release", RELEASES)
def test_peft_adds_the_adapters(exported, adapters_alone, release, tmp_path):
    python = python_with(release)
    base, alone = adapters_alone
    theirs = opened(python, base, exported, str(tmp_path / "out.npz"), alone)
    np.testing.assert_allclose(our_logits(exported), theirs["logits"], atol=2e-5)


def test_a_stage_starts_from_adapters_of_peft(exported, adapters_alone, tmp_path):
    """It carries them on where they are what it wants, else merges them."""
    config = exported.stage.config.copy_and_resolve_references()
    config.init_from = adapters_alone[1]
    find_source(config)
    same = build(config, str(tmp_path / "same"))
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, same.initial_params(), exported.params)
    text = "<|im_start|>user\nhi<|im_end|>"
    assert same.tokenizer.encode(text) == exported.stage.tokenizer.encode(text)
    config.lora.rank = 0
    config.model.preset = "published"
    merged = build(config, str(tmp_path / "merged"))
    jax.tree.map(close, merged.initial_params(), merge(exported.params, LORA))


def test_weights_that_were_trained_themselves_have_no_adapters(exported, tmp_path):
    said = export(
        f"--workdir={exported.stage.config.init_from}", f"--out={tmp_path}/out", "--adapters"
    ).stderr
    assert said.startswith("error: --adapters: ") and "leave the flag out" in said
    said = export(f"--workdir={exported.stage.workdir}", f"--out={tmp_path}/out", "--base=x").stderr
    assert said.startswith("error: --base=x: ") and not os.path.exists(tmp_path / "out")


def test_the_card_tells_what_the_run_knows(exported, adapters_alone):
    with open(os.path.join(exported.directory, "README.md"), encoding="utf-8") as f:
        card = f.read()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "after step 0 of the stage `stage2`" in card and "was not evaluated" in card
    assert "AutoProcessor.from_pretrained" in card and "`lora.rank` | `2`" in card
    assert exported.stage.config.feedback.render in card
    with open(os.path.join(adapters_alone[1], "README.md"), encoding="utf-8") as f:
        card = f.read()
    assert card.startswith("---\nlibrary_name: peft\n") and adapters_alone[0] in card


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
