"""The grammars of synthetic charts by name, `data.grammar`."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from mmrecoder_jax.data import panels, synthetic
from mmrecoder_jax.data.splits import Spec


@runtime_checkable
class Grammar(Protocol):
    """A module that draws charts from a grammar.

    Attributes:
      RC_PARAMS: the house style, which the executor applies before every script.
      DESCRIPTION: what its charts are like, for model cards; a phrase without a full stop.
      BEYOND: what its charts never have; a list of nouns, as it follows "such as".
    """

    @property
    def RC_PARAMS(self) -> Mapping[str, Any]: ...

    @property
    def DESCRIPTION(self) -> str: ...

    @property
    def BEYOND(self) -> str: ...

    def chart_spec(self, seed: int, index: int, split: str = "train") -> Spec:
        """Chart number `index` of a split."""
        ...

    def words(self) -> list[str]:
        """Every free word: what a tokenizer keeps apart from the code around it."""
        ...

    def tokenizer_texts(self, count: int, seed: int, extra: Iterable[str] = ()) -> list[str]:
        """What the tiny tokenizer is trained on; `extra` are further fixed texts."""
        ...

    def corrupt(self, code: str, donors: Sequence[str], rng: random.Random) -> str:
        """`code` with mistakes that a policy could make; `donors` are codes of other charts."""
        ...

    def diagnosis(self, draft: str, truth: str) -> str | None:
        """What a second turn thinks of a draft that runs; None: what its score says."""
        ...


GRAMMARS: Mapping[str, Grammar] = {"words": synthetic, "panels": panels}


def drawn_as(rc_params: Mapping[str, Any]) -> str:
    """The grammar whose house style these rc settings of a chart directory are, "" for none."""
    plain = json.dumps(rc_params, sort_keys=True)
    for name, grammar in GRAMMARS.items():
        if json.dumps(grammar.RC_PARAMS, sort_keys=True) == plain:
            return name
    return ""
