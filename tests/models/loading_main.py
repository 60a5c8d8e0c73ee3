"""Runs in its own process with 4 simulated devices: reads a published directory into sharded arrays
and watches its own memory.

Prints one JSON object of bytes: `arrays`, and the most `anonymous` memory above them. Mapped files
are the kernel's to drop: not counted.
"""

import json
import sys
import threading

import jax
import numpy as np

from mmrecoder_jax.models.published import load_config
from mmrecoder_jax.models.qwen2_5_vl import init_params
from mmrecoder_jax.models.sharding import make_mesh, param_shardings
from mmrecoder_jax.models.weights import load_pretrained


def anonymous() -> int:
    with open("/proc/self/status", encoding="ascii") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


mesh = make_mesh(1, 4, 1)
config = load_config(sys.argv[1])
jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
jax.block_until_ready(jax.device_put(np.ones(4), jax.devices()[0]))
before, most, done = anonymous(), 0, threading.Event()


def watch():
    global most
    while not done.wait(0.001):
        most = max(most, anonymous())


watcher = threading.Thread(target=watch)
watcher.start()
_, params = load_pretrained(
    sys.argv[1], lambda abstract: param_shardings(abstract, mesh), dtype="float32"
)
jax.block_until_ready(params)
done.set()
watcher.join()
cut = params["model"]["layers"]["mlp"]["up_proj"]["kernel"].addressable_shards
assert (
    len(cut) == 4
    and cut[0].data.size * 4 == params["model"]["layers"]["mlp"]["up_proj"]["kernel"].size
)
arrays = sum(x.nbytes for x in jax.tree.leaves(params))
# small: on all four devices
copied = sum(x.nbytes * 3 for x in jax.tree.leaves(params) if x.sharding.is_fully_replicated)
print(
    json.dumps({"arrays": arrays, "anonymous": max(most, anonymous()) - before - arrays - copied})
)
