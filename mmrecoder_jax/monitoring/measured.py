"""Metrics on held-out charts: the names that a stage can have, and which value is better.

eval/greedy/turn2/low_level    of RL (`held_out`)          higher is better
-held_out_loss                 of cold start 1             a leading "-": lower is better
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping

from ml_collections import ConfigDict

from mmrecoder_jax.config import ConfigError

PARTS = ("low_level", "text", "layout", "type", "color")  # of a score
DECODINGS = ("greedy", "sampled")
CORRECTION = ("improvement", "improved", "regressed", "code_repeat")  # of the last turn
LOSS = "held_out_loss"


def names_of(config: ConfigDict) -> list[str]:
    """Every metric on held-out charts that a training stage can have; it has none of those while
    `every(config)` is 0.
    """
    if config.stage == "sft_chart2code":
        return [LOSS]
    if "rl" not in config or "eval_every" not in config.rl:
        return []
    turns = config.rl.turns
    names = [f"turn{t}/{name}" for t in range(1, turns + 1) for name in ("exec_rate", *PARTS)]
    names += CORRECTION if turns > 1 else ()
    return [f"eval/{decoding}/{name}" for decoding in DECODINGS for name in names]


def every(config: ConfigDict) -> int:
    """Steps between two evaluations of a training stage; 0: it has none."""
    if not names_of(config):
        return 0
    return int(config.rl.eval_every if "rl" in config else config.train.eval_every)


@dataclasses.dataclass(frozen=True)
class Goal:
    """The metric that the best checkpoint is chosen by.

    Attributes:
      name: "" where there is none.
      sign: 1 where higher is better, -1 where lower is.
    """

    name: str = ""
    sign: int = 1

    @classmethod
    def of(cls, text: str) -> "Goal":
        """The goal of `checkpoint.best`."""
        return cls(text[1:], -1) if text.startswith("-") else cls(text)

    def worth(self, metrics: Mapping[str, float]) -> float | None:
        """How good metrics are, higher is better; None where they do not say."""
        value = metrics.get(self.name) if self.name else None
        return self.sign * value if value is not None and math.isfinite(value) else None


def check_best(config: ConfigDict) -> None:
    """Raises ConfigError where no row of a stage can have the metric of `checkpoint.best`."""
    best = config.checkpoint.best
    if not best:
        return
    names, name = names_of(config), Goal.of(best).name
    if not names:
        raise ConfigError(
            f"checkpoint.best={best!r}: {config.stage} measures nothing on held-out charts; set "
            '--config.checkpoint.best=""'
        )
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
        raise ConfigError(
            f"checkpoint.best={best!r} is no metric on held-out charts of {config.stage}: did you "
            f'mean {", ".join(near)}? A "-" before it: lower is better'
        )
    if not every(config):
        field = "rl.eval_every" if "rl" in config else "train.eval_every"
        raise ConfigError(
            f"checkpoint.best={best!r} is never measured, because {field}=0: set it to a number "
            "of steps, such as checkpoint.every"
        )
