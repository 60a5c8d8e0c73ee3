"""Cold start 2: two-turn SFT on dialogues whose second turn scores at least 0.02 higher.

python -m mmrecoder_jax.train --config=configs/sft_self_correction.py:tiny \\
    --workdir=runs/sft_self_correction --config.init_from=runs/tiny/sft_chart2code \\
    --config.data.dir=runs/tiny/data

Expected time: `:tiny` about 15 minutes on two CPU cores (5,000 policy answers, 7,500 drafts,
1,200 steps), `:smoke` half a minute. The 7B recipe was not run here.
"""

import os

from ml_collections import ConfigDict

from mmrecoder_jax.config import sized
from mmrecoder_jax.models.config import LORA_TARGETS

# What `:tiny` changes: a model of 1 M parameters on toy charts of 168 x 112 pixels.
TINY = {
    "model.preset": "tiny",
    "model.dtype": "float32",  # bfloat16 is slower on a CPU
    "model.remat": "none",
    "model.scan_unroll": 3,
    "processor.max_pixels": 168 * 112,
    "data.dir": "",
    "data.kind": "synthetic",
    "data.grammar": "panels",  # in which a second look pays (docs/tiny.md)
    "data.train_count": 8000,
    "data.val_count": 128,
    "data.test_count": 256,
    "data.lengths": (112, 208, 264, 320),
    "data.windows": (6, 12),
    "dialogues.policy": 5000,  # what the policy itself gets wrong (docs/results.md)
    "dialogues.synthetic": 2500,
    "dialogues.right": 0.2,
    "dialogues.later": 0.8,
    "dialogues.min_gain": 0.0,
    "train.steps": 1200,
    "train.epochs": 1.0,
    "train.batch_size": 32,
    "train.micro_batch_size": 32,
    "train.log_every": 10,
    "train.single_turn_share": 0.15,
    "optim.lr": 8e-4,
    "optim.b2": 0.98,
    "optim.patch_embed_lr": 0.1,  # from scratch: see `learner.update.make_optimizer`
    "optim.warmup_steps": 50,
    "optim.schedule": "cosine",
    "rl.prompt_length": 40,
    "rl.response_length": 96,
    "rl.decode_chunk": 24,
    "feedback.image": "signed",
    "feedback.render": "Here is where your render differs. Improve it.",
    "env.workers": 2,
    "env.dpi": 70,
    "env.wall_seconds": 20.0,
    "env.cpu_seconds": 5.0,
    "env.memory_mb": 1024,
    "env.max_pixels": 1_000_000,
    "env.preload": ("numpy", "matplotlib"),
    "env.feedback_chars": 120,
    "checkpoint.every": 150,
}
# What `:smoke` changes further: the mechanics alone; its numbers mean nothing.
SMOKE = {
    "data.grammar": "words",  # so that both grammars are gone through
    "data.train_count": 64,
    "data.val_count": 8,
    "data.test_count": 16,
    "data.lengths": (112, 264),
    "dialogues.policy": 16,
    "dialogues.synthetic": 32,
    "dialogues.batch_size": 16,
    "train.steps": 16,
    "train.batch_size": 8,
    "train.micro_batch_size": 8,
    "optim.warmup_steps": 2,
    "rl.response_length": 32,
    "checkpoint.every": 20,
}


def get_config(size: str | None = None) -> ConfigDict:
    """The 7B recipe (about 7k dialogues, 2 epochs, batch 128, lr 1e-5), or `tiny` / `smoke`."""
    config = ConfigDict(
        {
            "stage": "sft_self_correction",
            "size": "paper",  # what stood behind the colon; sets no field by itself
            "seed": 0,  # reaches initial weights, data order and sampling
            "init_from": "",  # work directory of cold start 1, or a Hugging Face directory
            "model": {
                "preset": "7b",  # tiny, 3b, 7b, 32b, 72b; published: the sizes of init_from
                "dtype": "bfloat16",  # type of compute
                "param_dtype": "float32",  # type of the master weights
                "remat": "full",  # what the backward pass recomputes: none, full, dots
                "attention": "auto",  # auto (best of the platform), xla, splash (TPU), cudnn (GPU)
                "scan_unroll": 1,  # layers per step of the scan over layers
                "loss_chunk": 2048,  # tokens of a device projected to logits at a time
                "freeze_vision": False,  # train the decoder alone
            },
            "lora": {  # adapters of the decoder; with a rank they alone are trained and saved
                "rank": 0,  # 0: no adapters, the weights themselves are trained
                "alpha": 16.0,  # an adapter's output is scaled by alpha / rank
                "targets": LORA_TARGETS,  # {q,k,v,o,gate,up,down}_proj
            },
            "processor": {
                "min_pixels": 4 * 28 * 28,  # smaller images are enlarged
                "max_pixels": 1280 * 28 * 28,  # larger ones are shrunk; ours: 1,280 visual tokens
                "system": "You are a helpful assistant.",  # the system prompt
            },
            "mesh": {
                "data": 1,  # copies of the model, each with its own rows
                "fsdp": -1,  # devices that share parameters and rows; -1: all that remain
                "tensor": 1,  # devices that share each matrix product
                "cpu_devices": 1,  # simulated devices where the platform is CPU
                "slices": 1,  # TPU slices, over which `data` is cut first
                "join_seconds": 300.0,  # that processes wait for one another at the start
                "silent_seconds": 100.0,  # without a sign of life, and a process counts as lost
            },
            "data": {
                "dir": "data/chart2code_160k",  # has train/ val/ test/; "": <workdir>/data
                "kind": "directory",  # directory: must exist; synthetic: built where it is missing
                "grammar": "words",  # of synthetic charts: words, panels
                "dialogues": "",  # two-turn dialogues; "": built with the policy of init_from
                "instruction": "Redraw this chart as Matplotlib code.",
                "seed": 0,  # of the synthetic charts, which runs of several seeds share
                "train_count": 0,  # synthetic charts per split
                "val_count": 0,
                "test_count": 0,
                "lengths": (2048, 4096, 6144, 8192, 12288),  # buckets of a row
                "windows": (32, 64, 96),  # buckets of an image (windows of the vision tower)
                "max_bad_rows": 0.0,  # unreadable rows that are skipped; below 1: a share of them
            },
            "dialogues": {  # how dialogues are built; the true code is always the second turn
                "policy": 7000,  # charts the policy answers; its answers become first turns
                "synthetic": 0,  # corrupted true scripts that become first turns
                "right": 0.0,  # share of corrupted scripts that are left right ("Looks right.")
                "later": 0.0,  # share of corrupted scripts that think as later turns do
                "min_gain": 0.02,  # least gain of the low-level score of a dialogue that is kept
                "temperature": 1.0,  # of the policy's answers
                "batch_size": 128,  # charts answered at one time
            },
            "train": {
                "steps": 0,  # updates; 0: from epochs
                "epochs": 2.0,
                "batch_size": 128,  # rows per update
                "micro_batch_size": 16,  # rows per micro-batch, over all hosts
                "micro_tokens": 0,  # of a device in a micro-batch; 0: as many as its rows have
                "log_every": 1,  # steps between progress lines
                "single_turn_share": 0.0,  # share of rows that are plain (image, code) pairs
            },
            "optim": {
                "name": "adamw",  # or adafactor (less memory), muon
                "lr": 1e-5,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.0,
                "decay": r"(kernel|lora_a|lora_b)$",  # pattern of the paths that decay
                "warmup_steps": 10,  # from lr / warmup_steps to lr; 0: none
                "schedule": "constant",  # or cosine, linear, wsd (all down to a tenth of lr)
                "decay_share": 0.2,  # wsd: of the steps, over which the rate falls at the end
                "ema": 0.0,  # decay of the mean of past parameters that is evaluated; 0: none
                "rounding": "stochastic",  # of bfloat16 weights: stochastic, or nearest
                "clip": 1.0,  # largest global norm of the gradients
                "patch_embed_lr": 1.0,  # rate of the patch embedding, as a share of lr
                "max_skipped": 10,  # updates in a row that are not finite (and skipped) end the run
            },
            "rl": {  # how the policy answers
                "prompt_length": 2048,  # bucket of a prompt (tokens)
                "response_length": 4096,  # longest response
                "decode_chunk": 256,  # tokens decoded between checks for finished rows
            },
            "feedback": {  # what the policy sees and reads after a turn
                "image": "render",  # render (the paper's), difference, signed, or both
                "render": "Here is the render of your code. Improve it.",
                "error": "The code failed:\n{error}\nFix it.",  # {error}: the error text
            },
            "env": {  # how scripts are executed
                "workers": max(
                    1, (os.cpu_count() or 2) - 1
                ),  # executors; leaves the trainer a core; 0: scripts run on the hosts alone
                "hosts": (),  # executor hosts, "name:port" each (docs/executor_hosts.md)
                "secret": "",  # file with the secret that they know
                "python": "",  # of the executors, such as DIR/bin/python; "": this one
                "dpi": 100,  # of every render
                "wall_seconds": 30.0,  # limits per script; it is killed when it passes one
                "cpu_seconds": 15.0,
                "memory_mb": 2048,
                "max_pixels": 4_000_000,  # of a figure
                "preload": (  # modules that an executor imports once, where they are installed
                    *("numpy", "matplotlib", "pandas", "seaborn"),
                    *("scipy", "networkx", "squarify", "matplotlib_venn"),
                ),
                "cache_size": 4096,  # results kept by code
                "feedback_chars": 1200,  # longest error text
                "replay_share": 0.05,  # of executions whose drawing is checked by a replay
                "bubblewrap": True,  # around the executors, where it is installed and works
                "sandbox": "auto",  # auto: contain scripts or refuse; unsafe: run them unconfined
            },
            "checkpoint": {
                "every": 50,  # steps
                "keep": 2,  # newest checkpoints that stay on disk
                "grace_seconds": 25.0,  # from SIGTERM to the end of the process, at the latest
                "keep_every": 0,  # steps between checkpoints that stay for good; 0: none
                "best": "",  # metric on held-out charts whose best step stays; -name: the lowest
                "accept_changes": False,  # resume a run whose data or settings have changed
            },
            "log": {
                "tensorboard": False,  # also write event files
                "wandb": "",  # also log to this wandb project
            },
        }
    )
    return sized(config, size, TINY, SMOKE)
