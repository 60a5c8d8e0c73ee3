"""One of two hosts whose rollouts the same server decodes; see `test_served`.

python -m tests.rl.served_hosts_main SOURCE DATA URL WORKDIR

Prints what became of a rollout, of one with the same policy, and of one that the server refuses to
one of the hosts.
"""

import sys

import jax

from mmrecoder_jax import stage as stages
from mmrecoder_jax.config import load
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl import rollout
from mmrecoder_jax.rl.web import ServerDown
from tests.learner.hosts_main import Scripted, roll


def main(source: str, data: str, url: str, workdir: str) -> None:
    jax.config.update("jax_num_cpu_devices", 1)
    distributed.start()
    rollout.extract_code = lambda text: text
    config = load("stage2", "smoke")
    config.init_from, config.data.dir = source, data
    config.rl.response_length = 12
    config.engine.update({"kind": "sglang", "url": url})
    stage = stages.build(config, workdir)
    params = stage.initial_params()
    assert not params["model"]["embed_tokens"]["weight"].is_fully_addressable
    engine = stage.engine(Scripted(), 1.0)
    charts = list(stage.charts("train"))
    for _ in range(3):
        try:
            groups = roll(engine, params, charts)
            print([len(t.turns) for group in groups for t in group])
        except (ServerDown, distributed.OtherHost) as problem:
            print(type(problem).__name__)


if __name__ == "__main__":
    main(*sys.argv[1:])
