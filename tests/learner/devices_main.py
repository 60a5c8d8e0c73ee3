"""What `test_devices` compares, on one host of a mesh; run as a process of its own, because JAX
takes the number of simulated devices once.

python -m tests.learner.devices_main DEVICES WORKDIR OUT.npz HOST HOSTS ADDRESS

Rolls out the policy of WORKDIR, and writes sampled ids, their log-probabilities, the loss and the
gradients.
"""

import sys

import jax
import numpy as np

from mmrecoder_jax import grpo
from mmrecoder_jax.config import load
from mmrecoder_jax.data import pipeline
from mmrecoder_jax.data.batching import BatchShape, Collate
from mmrecoder_jax.env import ChartEnv
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl.learner_batch import learner_rows
from mmrecoder_jax.rl.trajectory import Mode
from mmrecoder_jax.stage import build, env_config

MODE = Mode.FULL_TRAJECTORY


def join_hosts(devices: int, host: int, hosts: int, address: str) -> None:
    jax.config.update("jax_num_cpu_devices", devices // hosts)
    if hosts > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, hosts, host)


def main(devices: int, source: str, out: str, host: int, hosts: int, address: str) -> None:
    join_hosts(devices, host, hosts, address)
    config = load("stage2", "smoke")
    config.init_from = source
    config.data.dir = source + "/data"
    config.rl.response_length = 16
    config.mesh.update({"data": 2 if devices > 1 else 1, "fsdp": -1})
    stage = build(config, source)
    assert stage.mesh.size == devices
    params = stage.initial_params()
    charts = stage.charts("train")
    own = range(8 // hosts * host, 8 // hosts * (host + 1))
    with ChartEnv(env_config(config)) as env:
        engine, key = stage.engine(env, 1.0), jax.random.key(5)
        groups = engine.rollout(params, [charts[i] for i in own], own, key, mode=MODE, group=2)
    advantages = np.linspace(-1, 1, 16).reshape(8, 2, 1)[own.start : own.stop].repeat(2, axis=2)
    rows = learner_rows(groups, advantages, MODE, mask_truncated=False)
    collate = Collate(
        BatchShape(16 // hosts, (264,), (12,), 32 // hosts, sampled=True),
        stage.layout,
        totals=distributed.global_sum,
        largest=distributed.global_max,
    )
    batch = distributed.to_global(pipeline.learner_batch(rows, collate), stage.mesh, axis=1)
    loss_fn = grpo.make_loss(config, stage.token_logps())
    everywhere = jax.sharding.NamedSharding(stage.mesh, jax.sharding.PartitionSpec())
    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), out_shardings=everywhere)
    with jax.set_mesh(stage.mesh):
        (loss, metrics), grads = gradient(params, jax.tree.map(lambda x: x[0], batch))
    turns = [turn for group in groups for t in group for turn in t.turns]
    np.savez(
        out,
        loss=loss,
        logp=metrics["logp"],
        ids=np.concatenate([turn.ids for turn in turns]),
        logps=np.concatenate([turn.logps for turn in turns]),
        grads=np.concatenate([np.asarray(g).ravel() for g in jax.tree.leaves(grads)]),
    )


if __name__ == "__main__":
    devices, source, out, host, hosts, address = sys.argv[1:]
    main(int(devices), source, out, int(host), int(hosts), address)
