"""The fields every stage's configuration has, their paper values, and the `:tiny` and `:smoke`
sizes of the embedded default.

`configs/*.py` start from `base(...)`; every field is an absl flag (`--config.optim.lr=1e-5`).
"""

import difflib
import os
import runpy
from collections.abc import Iterator

from ml_collections import ConfigDict

from mmrecoder_jax.models.config import LORA_TARGETS

SIZES = ("paper", "tiny", "smoke")
# the paper's training steps, in order
STAGES = (
    "sft_chart2code",
    "sft_self_correction",
    "stage1",
    "stage2",
)


def base(stage: str, size: str) -> ConfigDict:
    """All fields with the paper's 7B values (arXiv 2604.01600), then resized for `tiny` or `smoke`.

    Raises ValueError for a size that does not exist.
    """
    if size not in SIZES:
        raise ValueError(f"no size {size!r} (the part after ':'); there are: {', '.join(SIZES)}")
    # buckets of a learner row (tokens); the last holds two full turns
    config = ConfigDict(
        {
            # sft_chart2code, sft_self_correction, stage1, stage2, pipeline or evaluate
            "stage": stage,
            "size": size,  # what was asked for after ':'; a word for reports
            "seed": 0,  # reaches data order, initial weights, sampling
            # work directory of an earlier stage of ours, or a Hugging Face directory
            "init_from": "",
            "model": {
                "preset": "7b",  # tiny, 3b, 7b, 32b, 72b
                "dtype": "bfloat16",  # compute
                "param_dtype": "float32",  # master weights
                "remat": "full",  # none, full, dots
                # auto (splash on TPU, cuDNN on GPU, XLA on CPU), xla, splash, cudnn
                "attention": "auto",
                "scan_unroll": 1,  # layers a step of the layer scan
                "loss_chunk": 512,  # tokens a row that enter the vocabulary at once
                "freeze_vision": False,  # train the decoder alone; RL then encodes each image once
            },
            "lora": {  # adapters of the decoder; with a rank they alone are trained and saved
                "rank": 0,  # 0: none, train the weights themselves
                "alpha": 16.0,  # what an adapter adds is scaled by alpha / rank
                # q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
                "targets": LORA_TARGETS,
            },
            "processor": {
                "min_pixels": 4 * 28 * 28,
                "max_pixels": 1280 * 28 * 28,  # our own bound: at most 1,280 visual tokens an image
                "system": "You are a helpful assistant.",
            },
            "mesh": {
                "data": 1,
                "fsdp": -1,  # -1: all remaining devices
                "tensor": 1,
                "cpu_devices": 1,  # simulated devices where the platform is CPU
            },
            "data": {
                "dir": "",  # holds train/ val/ test/ chart directories; "" is <workdir>/data
                "kind": "directory",  # directory: must exist; synthetic: built where it is missing
                # two-turn dialogues; "" is <workdir>/dialogues, built with the policy of init_from
                "dialogues": "",
                "gallery": "",  # a chart directory of real charts for evaluation; "" is none
                # where it is missing, the pipeline gathers charts from so many library examples; 0
                # is none
                "gallery_sample": 0,
                "instruction": "Redraw this chart as Matplotlib code.",
                # of the synthetic charts; apart from `seed`, so that runs with several seeds share
                # their charts
                "seed": 0,
                "train_count": 0,  # synthetic charts of each split
                "val_count": 0,
                "test_count": 0,
                "lengths": (
                    2048,
                    4096,
                    6144,
                    8192,
                    12288,
                ),
                "windows": (32, 64, 96),  # buckets of an image (windows of the vision tower)
            },
            "dialogues": {
                "policy": 7000,  # charts the policy answers; its wrong answers become first turns
                "synthetic": 0,  # corrupted truths that become first turns
                # kept where low-level(turn 2) - low-level(turn 1) is at least this
                "min_gain": 0.02,
                "temperature": 1.0,
                "batch_size": 128,
            },
            "train": {
                "steps": 0,  # 0: from epochs
                "epochs": 1.0,
                "batch_size": 128,  # rows of an update (prompts in RL)
                # rows of a micro-batch over all hosts; RL: a host takes whole groups, or equal
                # parts of one
                "micro_batch_size": 16,
                "log_every": 1,
                "eval_every": 0,  # supervised: held-out loss every so many steps; 0 is never
                "eval_batches": 4,
                # cold start 2: share of rows that are plain (image, code) pairs
                "single_turn_share": 0.0,
            },
            "optim": {
                "lr": 1e-5,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.0,
                "warmup_steps": 10,
                "schedule": "constant",  # constant, cosine (to a tenth)
                "clip": 1.0,  # global gradient norm
            },
            "rl": {
                "group": 8,  # G
                "turns": 2,
                "temperature": 1.0,
                "prompt_length": 2048,  # bucket of a prompt (tokens)
                # prompts, of all hosts together, that are sampled at once; 0: all of the batch
                "rollout_prompts": 0,
                "feedback_length": 2048,
                "response_length": 4096,
                "decode_chunk": 256,  # tokens between two looks for finished rows
                "aggregation": "token_mean",  # token_mean, sequence_mean, constant
                "truncated": "train",  # responses cut at the limit: train on them, or mask them
                "std_ddof": 1,
                "std_eps": 1e-6,
                "updates_per_batch": 1,  # 1 is on-policy; more use the clipped ratio
                "clip_low": 0.2,
                "clip_high": 0.2,
                "kl_coef": 0.0,  # to the policy of init_from
                "trajectories_every": 1,  # steps whose trajectories are written; 0 is none
            },
            "feedback": {  # what the policy sees and reads after a turn; {error} is the error text
                # render (the paper's), or difference: white where the render equals the target
                "image": "render",
                "render": "Here is the render of your code. Improve it.",
                "error": "The code failed:\n{error}\nFix it.",
            },
            "reward": {
                "alpha": 0.5,  # rule
                "beta": 0.4,  # model (needs a judge)
                "gamma": 0.0,
                "eta": 0.0,
                "mode": "training",  # training or official ChartMimic rules
                # none, http, local, or visual (a similarity of the pixels, no model)
                "judge": "none",
            },
            "judge": {
                "url": "http://localhost:8000/v1",  # http: an OpenAI-compatible server
                "model": "Qwen/Qwen2.5-VL-72B-Instruct",  # http: what the server calls it
                # http: environment variable with the server's key, if it wants one
                "key_variable": "MMRECODER_JUDGE_KEY",
                "in_flight": 64,  # http: questions at one time
                "timeout_seconds": 120.0,  # http: of one attempt
                # http: after the first attempt; the pause doubles from one second, and Retry-After
                # is obeyed
                "retries": 6,
                "path": "",  # local: a Qwen2.5-VL directory (config.json, *.safetensors, tokenizer)
                "batch_size": 8,  # local: pairs at one time on one host
                "prompt_length": 3072,  # local: bucket of a question with its two images (tokens)
                "max_tokens": 512,  # of an answer
                "max_failures": 100,  # pairs in a row without a score that end the run
            },
            "env": {
                "workers": max(1, (os.cpu_count() or 2) - 1),
                "dpi": 100,
                "rc_params": ConfigDict({}),
                "wall_seconds": 30.0,
                "cpu_seconds": 15.0,
                "memory_mb": 2048,
                "max_pixels": 4_000_000,
                "preload": (
                    "numpy",
                    "matplotlib",
                    "pandas",
                    "seaborn",
                    "scipy",
                    "networkx",
                    "squarify",
                    "matplotlib_venn",
                ),
                "cache_size": 4096,
                "feedback_chars": 1200,
                # of the executions whose drawing is replayed to find texts that are recorded but
                # hidden
                "replay_share": 0.05,
                "bubblewrap": True,  # around the executors, where it is installed and works
                # "unsafe" runs scripts unconfined where the kernel has neither Landlock nor seccomp
                "sandbox": "auto",
            },
            "eval": {
                "split": "test",
                "count": 256,  # charts
                "batch_size": 64,
                "turns": 4,
                "sampled": True,  # also at temperature 1
                "gallery_count": 0,  # real charts; 0 is all of data.gallery
            },
            "checkpoint": {"every": 50, "keep": 2},
            "log": {"tensorboard": False, "wandb": ""},
        }
    )
    if size != "paper":
        _tiny(config)
    if size == "smoke":
        _smoke(config)
    return config


def _tiny(config: ConfigDict) -> None:
    """A model of 1 M parameters on toy charts of 168x112 pixels; what two CPU cores can train from
    nothing.
    """
    config.update(
        {
            "model": {"preset": "tiny", "dtype": "float32", "remat": "none", "scan_unroll": 3},
            "processor": {"min_pixels": 4 * 28 * 28, "max_pixels": 168 * 112},
            "data": {
                "kind": "synthetic",
                "train_count": 4000,
                "val_count": 128,
                "test_count": 256,
                "lengths": (112, 208, 264),
                "windows": (6, 12),
            },
            "dialogues": {"policy": 896, "synthetic": 1400},
            "train": {"batch_size": 32, "micro_batch_size": 32, "log_every": 10},
            "optim": {"lr": 2e-3, "b2": 0.98, "warmup_steps": 50, "schedule": "cosine"},
            "rl": {
                "prompt_length": 40,
                "feedback_length": 80,
                "response_length": 72,
                "decode_chunk": 24,
                "trajectories_every": 5,
            },
            "reward": {"alpha": 0.9, "beta": 0.0},
            "feedback": {
                "image": "difference",
                "render": "Here is where your render differs. Improve it.",
            },
            "env": {
                "workers": 2,
                "dpi": 70,
                "preload": ("numpy", "matplotlib"),
                "wall_seconds": 20.0,
                "cpu_seconds": 5.0,
                "memory_mb": 1024,
                "max_pixels": 1_000_000,
                "feedback_chars": 120,
            },
            "eval": {"count": 128, "batch_size": 64, "gallery_count": 64},
        }
    )


def _smoke(config: ConfigDict) -> None:
    """The mechanics alone, in a minute or two; its numbers mean nothing."""
    config.update(
        {
            "data": {"train_count": 64, "val_count": 8, "test_count": 16, "lengths": (112, 264)},
            "dialogues": {"policy": 16, "synthetic": 32, "batch_size": 16},
            "train": {"batch_size": 8, "micro_batch_size": 8, "log_every": 10},
            "optim": {"warmup_steps": 2},
            "rl": {"group": 4, "response_length": 32, "trajectories_every": 1},
            "eval": {"count": 16, "batch_size": 16, "turns": 2, "sampled": False},
            "checkpoint": {"every": 20},
        }
    )


def load(name: str, size: str) -> ConfigDict:
    """`get_config(size)` of `configs/<name>.py` beside the running checkout."""
    path = os.path.join(
        os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs", name + ".py"
    )
    if not os.path.exists(path):
        raise FileNotFoundError(f"no configuration {path}: run from a checkout that has configs/")
    return runpy.run_path(path)["get_config"](size)


def field_names(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from field_names(value, f"{prefix}{name}.")
        yield f"{prefix}{name}"


def suggest(field: str, config: ConfigDict) -> str:
    """The message for a field that does not exist: what was typed, and the nearest names there
    are.
    """
    names = list(field_names(config))
    near = difflib.get_close_matches(field, names, n=3, cutoff=0.5)
    last = field.rsplit(".", 1)[-1]
    near += [
        name
        for name in names
        if difflib.get_close_matches(last, [name.rsplit(".", 1)[-1]], cutoff=0.7)
        and name not in near
    ][:3]
    hint = (
        f"did you mean {', '.join(near)}?"
        if near
        else f"there are: {', '.join(n for n in names if '.' not in n)}"
    )
    return f"no such field: config.{field}; {hint}"
