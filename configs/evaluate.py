"""Evaluation of a policy over several turns, greedy and sampled.

python -m mmrecoder_jax.evaluate --config=configs/evaluate.py:tiny --workdir=runs/eval \\
    --config.init_from=runs/tiny/stage2 --config.data.dir=runs/tiny/data

Expected time: `:tiny` about 2 minutes on two CPU cores (128 charts in four turns, greedy and
sampled), `:smoke` 10 seconds.
"""

import os

from ml_collections import ConfigDict

from mmrecoder_jax.config import sized
from mmrecoder_jax.models.config import LORA_TARGETS

# What `:tiny` changes: a model of 1 M parameters on toy charts of 168 x 112 pixels.
TINY = {
    "model.preset": "tiny",
    "model.dtype": "float32",  # bfloat16 is slower on a CPU
    "model.scan_unroll": 3,
    "processor.max_pixels": 168 * 112,
    "data.dir": "",
    "data.kind": "synthetic",
    "data.grammar": "panels",  # in which a second look pays (docs/tiny.md)
    "data.train_count": 8000,
    "data.val_count": 128,
    "data.test_count": 256,
    "data.windows": (6, 12),
    "rl.prompt_length": 40,
    "rl.feedback_length": 80,
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
    "eval.count": 128,
    "eval.remembered": 1,  # as in its training
    "eval.gallery_count": 64,
}
# What `:smoke` changes further: the mechanics alone; its numbers mean nothing.
SMOKE = {
    "data.grammar": "words",  # so that both grammars are gone through
    "data.train_count": 64,
    "data.val_count": 8,
    "data.test_count": 16,
    "rl.response_length": 32,
    "eval.count": 16,
    "eval.batch_size": 16,
    "eval.turns": 2,
    "eval.sampled": False,
}


def get_config(size: str | None = None) -> ConfigDict:
    """256 test charts in four turns, or `tiny` / `smoke`."""
    config = ConfigDict(
        {
            "stage": "evaluate",
            "size": "paper",  # what stood behind the colon; sets no field by itself
            "seed": 0,  # reaches initial weights, data order and sampling
            "init_from": "",  # work directory of a stage, or a Hugging Face directory
            "model": {
                "preset": "7b",  # tiny, 3b, 7b, 32b, 72b; published: the sizes of init_from
                "dtype": "bfloat16",  # type of compute
                "param_dtype": "float32",  # type of the master weights
                "attention": "auto",  # auto (best of the platform), xla, splash (TPU), cudnn (GPU)
                "scan_unroll": 1,  # layers per step of the scan over layers
                "freeze_vision": False,  # encode each image once, before the turns
            },
            "lora": {  # adapters of `init_from` are kept apart where these agree, else merged
                "rank": 0,
                "alpha": 16.0,
                "targets": LORA_TARGETS,
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
                "dir": "data/chartmimic",  # has train/ val/ test/; "": <workdir>/data
                "kind": "directory",  # directory: must exist; synthetic: built where it is missing
                "grammar": "words",  # of synthetic charts: words, panels
                "gallery": "",  # a chart directory of real charts to evaluate on too; "": none
                "instruction": "Redraw this chart as Matplotlib code.",
                "seed": 0,  # of the synthetic charts, which runs of several seeds share
                "train_count": 0,  # synthetic charts per split
                "val_count": 0,
                "test_count": 0,
                "windows": (32, 64, 96),  # buckets of an image (windows of the vision tower)
            },
            "rl": {
                "prompt_length": 2048,  # bucket of a prompt (tokens)
                "feedback_length": 2048,  # bucket of one feedback message
                "response_length": 4096,  # longest response
                "decode_chunk": 256,  # tokens decoded between checks for finished rows
            },
            "feedback": {  # what the policy sees and reads after a turn
                "image": "render",  # render (the paper's), difference, signed, or both
                "render": "Here is the render of your code. Improve it.",
                "error": "The code failed:\n{error}\nFix it.",  # {error}: the error text
            },
            "reward": {
                "mode": "training",  # ChartMimic rules: training or official
                "judge": "none",  # none, http, local, or visual (similarity of pixels, no model)
            },
            "judge": {
                "question": "points",  # http, local: points, or differences (for small models)
                "url": "http://localhost:8000/v1",  # http: an OpenAI-compatible server
                "model": "Qwen/Qwen2.5-VL-72B-Instruct",  # http: the server's name for the judge
                "key_variable": "MMRECODER_JUDGE_KEY",  # http: variable that holds the key
                "in_flight": 64,  # http: questions at one time
                "timeout_seconds": 120.0,  # http: per attempt
                "retries": 6,  # http: after the first attempt; pauses double from one second
                "path": "",  # local: a Qwen2.5-VL directory with its tokenizer
                "batch_size": 8,  # local: pairs per batch on one host
                "prompt_length": 3072,  # local: bucket of a question with its two images (tokens)
                "max_tokens": 512,  # of an answer
                "max_failures": 100,  # pairs in a row without a score end the run
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
                "replay_share": 1.0,  # of executions whose drawing is checked by a replay
                "bubblewrap": True,  # around the executors, where it is installed and works
                "sandbox": "auto",  # auto: contain scripts or refuse; unsafe: run them unconfined
            },
            "eval": {
                "split": "test",
                "count": 256,  # charts of the split; 0: all of them
                "batch_size": 64,  # charts at one time
                "turns": 4,
                "remembered": 0,  # earlier turns that the policy sees; 0: all
                "sampled": True,  # at temperature 1 too
                "gallery_count": 0,  # real charts, evenly spread; 0: all of data.gallery
            },
        }
    )
    return sized(config, size, TINY, SMOKE)
