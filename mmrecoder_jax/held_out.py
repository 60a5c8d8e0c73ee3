"""Evaluation during RL: the policy redraws held-out charts, greedily and as in rollouts.

    eval/greedy/turn1/low_level   eval/greedy/turn2/exec_rate   eval/greedy/improvement   ...
    eval/sampled/...

Charts are asked about one conversation each, by the programs of the rollouts: places, slots and
modes are theirs, and the temperature is an argument. Random numbers come from the seed and from a
chart's number, alike at every step, so that two steps differ by their policies alone. Nothing here
touches what the run draws from: a run that is evaluated takes the steps of one that is not.
"""

import os
from typing import Any

import jax

from mmrecoder_jax.config import ConfigError, data_dir, derived_seed
from mmrecoder_jax.evaluation import Evaluation, measure, with_refused
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.monitoring.measured import CORRECTION, PARTS
from mmrecoder_jax.rl.correction import correction
from mmrecoder_jax.rl.rollout import RolloutEngine, answer_all
from mmrecoder_jax.rl.schedule import Size
from mmrecoder_jax.rl.trajectory import Mode
from mmrecoder_jax.stage import Stage

SPLIT = "val"


class HeldOutCharts:
    """The first `rl.eval_count` charts of the val split, evaluated every `rl.eval_every` steps.

    Args:
      engine: of the rollouts.
      mode: of the stage.

    Raises:
      ConfigError: no such charts, and `checkpoint.best` needs them.
    """

    def __init__(self, stage: Stage, engine: RolloutEngine, mode: Mode):
        config = stage.config
        self._rl, self._mode = config.rl, mode
        self._every = config.rl.eval_every
        self._prompts = config.train.batch_size
        self._key = jax.random.key(derived_seed(config, "evaluation"))
        if self._every and not os.path.isdir(os.path.join(data_dir(config, stage.workdir), SPLIT)):
            if config.checkpoint.best:
                stage.charts(SPLIT)  # says what is missing
            if distributed.is_main():
                print(f"no evaluation during training: no {SPLIT}/ in data.dir", flush=True)
            self._every = 0
        if not self._every:
            return
        charts = stage.charts(SPLIT)
        self._charts = [charts[i] for i in range(min(self._rl.eval_count, len(charts)))]
        if not self._charts:
            raise ConfigError(
                f"rl.eval_every={self._every}, but there is no chart in {charts.directory}: add "
                "some, or set --config.rl.eval_every=0"
            )
        self._engines = {"greedy": engine.at(0.0), "sampled": engine.at(self._rl.temperature)}

    def is_due(self, step: int, last: int) -> bool:
        """Whether this step ends with an evaluation."""
        return bool(self._every) and (step % self._every == 0 or step == last)

    def metrics(self, params: Any) -> dict[str, float]:
        """The metrics of a policy; all hosts call this together. A chart that cannot be shown to
        the policy counts as a failure.
        """
        found: dict[str, float] = {}
        for decoding, engine in self._engines.items():
            found |= {
                f"eval/{decoding}/{name}": value
                for name, value in metrics_of(self._evaluation(engine, params)).items()
            }
        return found

    def _evaluation(self, engine: RolloutEngine, params: Any) -> Evaluation:
        rl = self._rl
        prompts = rl.rollout_prompts or self._prompts
        answers = answer_all(
            engine,
            params,
            self._charts,
            self._key,
            turns=rl.turns,
            batch_size=self._prompts,
            mode=self._mode,
            at_once=Size(prompts=prompts, rows=rl.rows, members=rl.group),
        )
        own = with_refused(answers, self._charts, rl.turns)
        return measure("held out", own, rl.turns)


def metrics_of(evaluation: Evaluation) -> dict[str, float]:
    """Means over charts by turn, and the last turn against the first over the first turns that
    execute (`rl.correction`); without these where none does.
    """
    turns = evaluation.scores.shape[1]
    found: dict[str, float] = {}
    for turn in range(turns):
        found[f"turn{turn + 1}/exec_rate"] = float(evaluation.executed[:, turn].mean())
        for part, name in enumerate(PARTS):
            found[f"turn{turn + 1}/{name}"] = float(evaluation.scores[:, turn, part].mean())
    if turns == 1:
        return found
    low, last = evaluation.scores[..., 0], turns - 1
    change = correction(
        evaluation.executed[:, 0], low[:, 0], low[:, last], evaluation.repeats[:, last]
    )
    if change is None:
        return found
    values = float(change.gains.mean()), change.improved, change.regressed, change.code_repeat
    return found | dict(zip(CORRECTION, values, strict=True))
