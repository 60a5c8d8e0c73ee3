"""The policy as the learner sees it: log-probabilities of tokens under given parameters."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.language import RowLayout
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, visual_tokens
from mmrecoder_jax.models.sharding import batch_sharding, each_on_its_rows
from mmrecoder_jax.models.trees import Chosen, join, split
from mmrecoder_jax.rl.losses import token_logps

Params = Any
Batch = dict[str, np.ndarray]
# (params, micro-batch) -> log-probabilities and entropies of its tokens, float32 [P, T].
TokenLogps = Callable[[Params, dict[str, Array]], tuple[Float[Array, "P T"], Float[Array, "P T"]]]


def policy_logps(
    model: Qwen25VL,
    forbidden: Sequence[int],
    temperature: float,
    chunk: int,
    learns_entropy: bool = False,
) -> TokenLogps:
    """`logps(params, micro_batch)` of a policy; traceable.

    Args:
      forbidden: ids that are never sampled, so have no probability here either.
      temperature: at which the tokens were sampled.
      chunk: tokens of a part projected to logits at a time.
      learns_entropy: whether the entropies have a gradient.
    """
    banned = np.zeros(model.config.vocab_size, bool)
    banned[list(forbidden)] = True

    def logps(params: Params, batch: dict[str, Array]) -> tuple[Array, Array]:
        variables = {"params": params}
        features = visual_tokens(model, params, batch)
        hidden = model.apply(
            variables,
            batch["tokens"],
            batch["positions"],
            batch["vision_index"],
            features,
            RowLayout(batch["rows"], batch["home"]),
            method=Qwen25VL.packed,
        )

        def of_parts(
            head: Array, hidden: Array, tokens: Array, parent: Array
        ) -> tuple[Array, Array]:
            def logits(x: Array) -> Array:
                projected = model.apply(variables, x, head, method=Qwen25VL.logits)
                assert isinstance(projected, jax.Array)  # not (value, state): nothing is mutable
                return projected

            how = banned, temperature, chunk, learns_entropy
            return token_logps(logits, hidden, tokens, parent, *how)

        head = model.apply(variables, method=Qwen25VL.head)
        assert isinstance(hidden, jax.Array) and isinstance(head, jax.Array)
        # Each device projects its own part: the head is gathered once instead of per chunk.
        return each_on_its_rows(of_parts, head, hidden, batch["tokens"], batch["parent"])

    return logps


def copy_of_trained(params: Params, trained: Chosen) -> Params:
    """A policy that stays as it is while `params` are updated: what is trained is copied, the rest
    is shared.
    """
    moving, fixed = split(params, trained)
    return join(jax.tree.map(jnp.copy, moving), fixed)


class FixedLogps:
    """Log-probabilities that stay fixed during the updates of a batch, without gradient.

    `old_logps` are those before the first of several updates (`rl.updates_per_batch`,
    `rl.mini_batches`), `ref_logps` those of a reference policy (`rl.kl_coef`).

    Args:
      penalised: whether the loss wants `ref_logps`.
    """

    def __init__(self, logps: TokenLogps, mesh: Mesh, updates_per_batch: int, penalised: bool):
        self._mesh, self._updates, self._penalised = mesh, updates_per_batch, penalised
        by_row = batch_sharding(mesh)
        self._one = jax.jit(lambda params, micro: logps(params, micro)[0], out_shardings=by_row)

    def add_to(self, params: Params, reference: Params, batch: Batch) -> Batch:
        """The batch with "old_logps" (if it has none) and "ref_logps" where the loss wants them.

        Args:
          params: the policy before the first update.
          reference: None where there is none.
          batch: this host's arrays, `[M, ...]`.
        """
        if self._updates > 1 and "old_logps" not in batch:
            batch = batch | {"old_logps": self.of(params, batch)}
        if self._penalised:
            batch = batch | {"ref_logps": self.of(reference, batch)}
        return batch

    def outline(self, micro: Batch) -> Batch:
        """A micro-batch with places for what `add_to` adds."""
        names = ["old_logps"] if self._updates > 1 else []
        names += ["ref_logps"] if self._penalised else []
        return micro | dict.fromkeys(names, micro["weights"])

    def of(self, params: Params, batch: Batch) -> Float[np.ndarray, "M P T"]:
        """Log-probabilities of this host's parts, one micro-batch after the other."""
        parts = ({name: x[i] for name, x in batch.items()} for i in range(len(batch["tokens"])))
        with jax.set_mesh(self._mesh):
            return np.stack(
                [
                    distributed.to_host(self._one(params, distributed.to_global(part, self._mesh)))
                    for part in parts
                ]
            )
