"""RL stage 2, full trajectory: GRPO on both turns of G whole trajectories per prompt.

python -m mmrecoder_jax.train --config=configs/stage2.py:tiny --workdir=runs/stage2 \\
    --config.init_from=runs/tiny/stage1 --config.data.dir=runs/tiny/data

Expected time: `:tiny` about 3 minutes on two CPU cores, `:smoke` half a minute. The paper trained
on 16 x 8 H200 with 4 x 8 more for the judge; the 7B recipe was not run here.
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
    "train.steps": 20,
    "train.batch_size": 16,
    "train.micro_batch_size": 64,
    "train.log_every": 2,
    "optim.lr": 2e-5,  # above, the policy forgets how to read
    "optim.b2": 0.98,
    "optim.patch_embed_lr": 0.1,  # from scratch: see `learner.update.make_optimizer`
    "optim.warmup_steps": 10,
    "rl.prompt_length": 40,
    "rl.feedback_length": 80,
    "rl.response_length": 96,
    "rl.decode_chunk": 24,
    "rl.eval_every": 0,  # the pipeline evaluates every stage at its end
    "rl.eval_count": 16,
    "rl.trajectories_every": 5,
    "rl.trajectories_gb": 1.0,
    "feedback.image": "signed",
    "feedback.render": "Here is where your render differs. Improve it.",
    "reward.alpha": 0.6,
    "reward.beta": 0.3,
    "reward.judge": "visual",  # no model
    "alarms.code_repeat": 0.95,  # most first turns are right, and rightly repeated
    "alarms.identical_renders": 0.95,
    "env.workers": 2,
    "env.dpi": 70,
    "env.wall_seconds": 20.0,
    "env.cpu_seconds": 5.0,
    "env.memory_mb": 1024,
    "env.max_pixels": 1_000_000,
    "env.preload": ("numpy", "matplotlib"),
    "env.feedback_chars": 120,
    "checkpoint.every": 10,
}
# What `:smoke` changes further: the mechanics alone; its numbers mean nothing.
SMOKE = {
    "data.grammar": "words",  # so that both grammars are gone through
    "data.train_count": 64,
    "data.val_count": 8,
    "data.test_count": 16,
    "data.lengths": (112, 264),
    "train.steps": 3,
    "train.batch_size": 4,
    "train.micro_batch_size": 8,
    "train.log_every": 1,
    "rl.group": 4,
    "rl.response_length": 32,
    "rl.trajectories_every": 1,
    "checkpoint.every": 1,
}


def get_config(size: str | None = None) -> ConfigDict:
    """The 7B recipe (128 prompts, G = 8, lr 1e-6, 1 epoch), or `tiny` / `smoke`."""
    config = ConfigDict(
        {
            "stage": "stage2",
            "size": "paper",  # what stood behind the colon; sets no field by itself
            "seed": 0,  # reaches initial weights, data order and sampling
            "init_from": "",  # work directory of an earlier stage, or a Hugging Face directory
            "model": {
                "preset": "7b",  # tiny, 3b, 7b, 32b, 72b; published: the sizes of init_from
                "dtype": "bfloat16",  # type of compute
                "param_dtype": "float32",  # type of the master weights
                "remat": "full",  # what the backward pass recomputes: none, full, dots
                "attention": "auto",  # auto (best of the platform), xla, splash (TPU), cudnn (GPU)
                "scan_unroll": 1,  # layers per step of the scan over layers
                "loss_chunk": 2048,  # tokens of a device projected to logits at a time
                "freeze_vision": False,  # train the decoder alone; RL then encodes each image once
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
                "instruction": "Redraw this chart as Matplotlib code.",
                "seed": 0,  # of the synthetic charts, which runs of several seeds share
                "train_count": 0,  # synthetic charts per split
                "val_count": 0,
                "test_count": 0,
                "lengths": (2048, 4096, 6144, 8192, 12288),  # buckets of a row
                "windows": (32, 64, 96),  # buckets of an image (windows of the vision tower)
                "max_bad_rows": 0.0,  # unreadable rows that are skipped; below 1: a share of them
            },
            "train": {
                "steps": 0,  # updates; 0: from epochs
                "epochs": 1.0,
                "batch_size": 128,  # prompts per update
                "micro_batch_size": 16,  # over all hosts; per host whole groups, or equal parts
                "micro_tokens": 0,  # of a device in a micro-batch; 0: as many as its rows have
                "log_every": 1,  # steps between progress lines
            },
            "optim": {
                "name": "adamw",  # or adafactor (less memory), muon
                "lr": 1e-6,
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
            "rl": {
                "group": 8,  # G: samples per prompt
                "turns": 2,
                "temperature": 1.0,
                "top_k": 0,  # sample among so many of the most probable ids alone; 0: all
                "top_p": 1.0,  # among the most probable ids that together have this probability
                "min_p": 0.0,  # among ids at least this share as probable as the most probable one
                "stop": (),  # texts that end a response, beside the end token
                "prompt_length": 2048,  # bucket of a prompt (tokens)
                "feedback_length": 2048,  # bucket of one feedback message
                "response_length": 4096,  # longest response
                "decode_chunk": 256,  # tokens decoded between checks for finished rows
                "rollout_prompts": 0,  # prompts under way at one time, over all hosts; 0: all
                "rows": 0,  # responses decoded side by side, over all hosts; 0: all of these
                "ahead": 0,  # steps whose rollouts are drawn before their turn; 0: on-policy
                "partial": 0,  # tokens after which a response rests until the next step; 0: none
                "max_importance": 2.0,  # largest weight of a token of an older policy, or a server
                "aggregation": "token_mean",  # token_mean, sequence_mean, constant
                "truncated": "train",  # responses cut at the limit: train on them, or mask them
                "overlong": 0,  # tokens before the limit over which a penalty grows to 1; 0: none
                "advantage": "group",  # group, mean (no deviation), rloo (others' mean)
                "std_ddof": 1,  # of a group's deviation: 1 sample, 0 population
                "std_eps": 1e-6,  # added to it
                "credit": "trajectory",  # what has an advantage: trajectory, or turn by turn
                "resample": 0,  # times that a group of equal rewards is drawn again
                "updates_per_batch": 1,  # 1 is on-policy; more use the clipped ratio
                "mini_batches": 1,  # of a batch, each an optimizer step of its own
                "objective": "grpo",  # what is clipped: grpo, gspo (of a row), cispo (a weight)
                "clip_low": 0.2,
                "clip_high": 0.2,
                "clip_dual": 0.0,  # grpo, gspo: bound where advantages are negative; 0: none
                "max_logp_gap": 0.1,  # nats a token between sampler and learner; above: no step
                "kl_coef": 0.0,  # weight of the divergence from a reference; 0: there is none
                "kl": "k3",  # estimate of that divergence: k1 (in the reward), k2, k3
                "kl_in": "loss",  # what it is part of: loss, reward (before advantages)
                "reference_every": 0,  # steps until the policy is the reference; 0: init_from's is
                "entropy_coef": 0.0,  # weight of the entropy bonus
                "eval_every": 50,  # steps between evaluations on the val split; 0: never
                "eval_count": 128,  # charts of it, greedy and sampled, in rl.turns turns
                "trajectories_every": 1,  # steps between written trajectories; 0: none
                "trajectories_gb": 20.0,  # of them on disk; above, the oldest but the first go
            },
            "engine": {  # who decodes the rollouts
                "kind": "sampler",  # sampler (ours), or a server: sglang, vllm
                "url": "http://localhost:30000",  # of the server, without a path of its own
                "key_variable": "MMRECODER_ENGINE_KEY",  # variable that holds the server's key
                "in_flight": 256,  # responses that a host asks for at one time
                "timeout_seconds": 600.0,  # per attempt: a response, or loading the policy
                "retries": 6,  # after the first attempt; pauses double from one second
            },
            "feedback": {  # what the policy sees and reads after a turn
                "image": "render",  # render (the paper's), difference, signed, or both
                "render": "Here is the render of your code. Improve it.",
                "error": "The code failed:\n{error}\nFix it.",  # {error}: the error text
            },
            "reward": {  # R(o) = (1 - alpha - beta) format + alpha rule + beta model
                "alpha": 0.5,  # the paper gives no numbers for alpha and beta
                "beta": 0.4,  # needs a judge
                "gamma": 0.0,  # weight of earlier turns
                "eta": 0.0,  # weight of the bonus where turn 2 beats turn 1
                "mode": "training",  # ChartMimic rules: training or official
                "judge": "http",  # none, http, local, or visual (similarity of pixels, no model)
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
                "replay_share": 0.05,  # of executions whose drawing is checked by a replay
                "bubblewrap": True,  # around the executors, where it is installed and works
                "sandbox": "auto",  # auto: contain scripts or refuse; unsafe: run them unconfined
            },
            "alarms": {  # where each begins (docs/monitors.md); a share is never above 1
                "exec_rate": 0.2,  # rings below: share of responses whose script runs, of any turn
                "code_repeat": 0.5,  # share of second turns with the first one's code
                "improved": 0.02,  # rings below: share of second turns that score higher
                "regressed": 0.3,  # share of second turns that score lower
                "same": 0.95,  # share of second turns that score alike
                "identical_renders": 0.5,  # share of second turns with the first one's picture
                "fallen": 0.03,  # fall of a turn's low-level score since the stage's first steps
                "blank": 0.1,  # share of responses whose script draws nothing
                "hidden_text": 0.05,  # share of replays that find texts nobody can see
                "tampered": 0.01,  # share of executions that changed what draws or records
                "forged": 0.0,  # share of replays that find a record that was not drawn
                "undecided": 0.2,  # share of replays that cannot be done
                "silent_groups": 0.9,  # share of groups that are paid alike
                "thought_length": 2.0,  # factor by which thoughts have left their first length
                "disagreement": 0.4,  # mean distance of the rule's score and the judge's
                "logp_gap": 0.05,  # nats a token between sampler and learner
                "skipped": 0.0,  # updates of a step that were not taken
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
