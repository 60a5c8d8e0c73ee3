"""Who decodes the conversations of rollouts: our sampler (`rl.schedule.Run`), or a server
(`rl.served`).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from mmrecoder_jax.rl.answering import Answering
from mmrecoder_jax.rl.conversations import Group
from mmrecoder_jax.rl.schedule import Device, Phases, Size, Stats


@runtime_checkable
class Rollout(Protocol):
    """One rollout.

    Attributes:
      answering: has the judge's questions, when all conversations are done.
      stats: what was decoded.
    """

    answering: Answering
    stats: Stats

    def go(self) -> None:
        """Runs all conversations to their ends, or until they rest: their pieces and turns are then
        in the groups.
        """
        ...


@runtime_checkable
class Decoder(Protocol):
    """Begins rollouts; all hosts call it together, each with its own groups."""

    def __call__(
        self,
        engine: Device,
        params: Any,
        key: jax.Array,
        groups: Sequence[Group],
        turns: int,
        size: Size,
        progress: Phases,
        budget: int = 0,
        meanwhile: Callable[[], None] | None = None,
    ) -> Rollout:
        """A rollout that has not begun to decode.

        Args:
          params: the policy.
          key: decides random numbers, together with uids and turns.
          groups: fresh ones, and those that rested in an earlier rollout.
          turns: after which a conversation is done.
          size: how much is under way at one time; what that means is up to who decodes.
          budget: tokens that a response may have written when it rests, to be finished in a later
            rollout; 0: none rests.
          meanwhile: work of the devices that is done once, beside the decoding.
        """
        ...
