"""A batch of rows with very unequal numbers of loss tokens, what the product makes of it, and the
same loss row by row in float64.

The policy is a table: the logits of a token are the table's row of the token before it. So a token
has the same log-probability wherever it stands, and all that can go wrong is who is counted.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmrecoder_jax import grpo
from mmrecoder_jax.config import load, set_fields
from mmrecoder_jax.data.batching import BatchShape, Collate, Piece, TokenRow, VisionLayout
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.learner.update import Update, from_params
from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.rl.policy import FixedLogps

VOCAB, GROUP, PROMPTS, MOST = 11, 4, 8, 64
LENGTH = 128
# Loss tokens of the turns of a group's members. A turn of 0 is masked, as rl.truncated=mask does it
# (its tokens are there, and carry no loss); a member of (0, 0) has no loss at all.
COUNTS = [
    [(1, 1), (40, 2), (3, 0), (0, 0)],
    [(2, 60), (1, 1), (0, 5), (7, 1)],
    [(1, 3), (1, 1), (64, 64), (2, 2)],
    [(0, 1), (0, 0), (0, 0), (5, 30)],
]
LAYOUT = VisionLayout(VOCAB, 0, window_patches=4, patch_dim=1)
AGGREGATIONS = ("token_mean", "sequence_mean", "constant")


def table(seed: int) -> np.ndarray:
    """The table of a policy."""
    return np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)).astype(np.float32)


def rows_of(shared: bool, last_turn: bool = False) -> list[TokenRow]:
    """Groups of rows, adjacent; those of a group have the prompt in common where it is `shared`.

    Args:
      last_turn: only the last turn carries loss, and the first is common too, as in stage 1.
    """
    rng = np.random.default_rng(0)
    rows = []

    def piece(count, turn):
        ids = rng.integers(1, VOCAB, count).astype(np.int32)
        return Piece(ids, turn, logps=rng.normal(-1, 0.3, count).astype(np.float32))

    for p in range(PROMPTS):
        prompt, first = piece(2 + p % 3, 0), piece(4, 1)
        for one, two in COUNTS[p % len(COUNTS)]:
            begins = (prompt, first if last_turn else piece(one or 9, 1))
            if not shared:
                begins = tuple(dataclasses.replace(each) for each in begins)
            pieces = (*begins, piece(3, 0), piece(two or 5, 2))
            turns = ((1, one), (2, two))[1 if last_turn else 0 :]
            credit = tuple(rng.normal(size=2).round(2).tolist())
            chosen = tuple(turn for turn, count in turns if count)
            rows.append(TokenRow(pieces, chosen, credit[-1], turn_advantages=credit))
    return rows


# ---------------------------------------------------------------- row by row, in float64


def log_softmax(weights):
    return weights - np.log(np.exp(weights).sum(axis=-1, keepdims=True))


def plain_loss(params, rows, fields, held, old, reference):
    """The loss as its formulas say it, row by row.

    Args:
      held: what has no gradient is computed with this table, which has the same numbers.
      old: the policy before the first mini-batch; None where there is one.
    """
    now, still, ref = map(log_softmax, (params, held, reference))
    before = still if old is None else log_softmax(old)
    shares = []  # of each row with loss tokens: what each of them adds
    for row in rows:
        ids = np.concatenate([piece.ids for piece in row.pieces])
        turns = np.concatenate([np.full(len(piece.ids), piece.turn) for piece in row.pieces])
        at = np.array([i for i in range(1, len(ids)) if turns[i] in row.loss_turns], int)
        if not len(at):
            continue
        pairs = ids[at - 1], ids[at]
        change = now[pairs] - before[pairs]
        if fields.get("objective") == "gspo":
            change = np.full(len(at), change.sum() / len(at))
        advantage = np.array(row.turn_advantages)[turns[at] - 1]
        ratio = np.exp(change)
        if fields.get("objective") == "cispo":
            weight = np.clip(np.exp(still[pairs] - before[pairs]), 0.8, 1.2)
            found = -weight * advantage * now[pairs]
        elif old is None:
            found = -ratio * advantage
        else:
            found = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
        apart = ref[pairs] - now[pairs]
        estimate = apart**2 / 2 if fields.get("kl") == "k2" else np.exp(apart) - apart - 1
        entropy = -(np.exp(now) * now).sum(-1)[pairs[0]]
        found = found + fields.get("kl_coef", 0.0) * estimate
        shares.append(found - fields.get("entropy_coef", 0.0) * entropy)
    if fields["aggregation"] == "token_mean":
        return sum(share.sum() for share in shares) / sum(len(share) for share in shares)
    if fields["aggregation"] == "sequence_mean":
        return sum(share.sum() / len(share) for share in shares) / len(shares)
    return sum(share.sum() for share in shares) / (MOST * len(shares))


def plain(rows, fields, parts, rate):
    """(loss of each mini-batch, the table after all steps of gradient descent); gradients are
    differences, exact to about 1e-9.
    """
    params, reference = np.float64(table(1)), np.float64(table(2))
    old = params if parts > 1 else None
    losses, each, h = [], len(rows) // parts, 1e-5
    for first in range(0, len(rows), each):
        args = rows[first : first + each], fields, params, old, reference
        losses.append(plain_loss(params, *args))
        gradient = np.zeros_like(params)
        for i in np.ndindex(params.shape):
            step = np.zeros_like(params)
            step[i] = h
            gradient[i] = (plain_loss(params + step, *args) - plain_loss(params - step, *args)) / 2
        params = params - rate * gradient / h
    return losses, params


# ---------------------------------------------------------------- as the product does it


@functools.cache
def settings(fields: tuple[tuple[str, object], ...], parts: int):
    """The configuration of stage 2 with fields of `rl`."""
    config = load("stage2", "smoke")
    set_fields(config, {f"rl.{name}": value for name, value in fields})
    config.rl.mini_batches = parts
    return config


def token_logps(params, micro):
    """(log-probabilities, entropies) of a micro-batch's tokens, by the table."""
    before = jnp.take_along_axis(micro["tokens"], jnp.maximum(micro["parent"], 0), axis=1)
    every = jax.nn.log_softmax(params["norm"]["weight"][before], axis=-1)
    chosen = jnp.take_along_axis(every, micro["tokens"][..., None], axis=-1)[..., 0]
    # What carries no weight may be anything.
    chosen = jnp.where(micro["weights"] != 0, chosen, -jnp.inf)
    return chosen, -(jnp.exp(every) * every).sum(-1)


def trained(rows, fields, parts, micro_rows, budget, rate, devices=None):
    """(loss of each mini-batch, the table after all steps), of this host's rows.

    Args:
      rows: of this host.
      micro_rows: rows of a micro-batch on this host; budget: `BatchShape.budget`.
    """
    config = settings(tuple(fields.items()), parts)
    mesh = make_mesh(1, -1, 1, devices)
    ways = len(mesh.local_devices)
    shape = BatchShape(micro_rows, (LENGTH, 256), (1,), ways, sampled=True, budget=budget)
    collate = Collate(
        shape,
        dataclasses.replace(LAYOUT, ways=ways),
        aggregation=config.rl.aggregation,
        max_tokens=MOST,
        totals=distributed.global_sum,
        largest=distributed.global_max,
    )
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def put(values):
        whole = jax.make_array_from_callback(values.shape, everywhere, values.__getitem__)
        return {"norm": {"weight": whole}}  # a name that devices do not cut

    tx = optax.scale_by_schedule(lambda count: -rate)
    state = from_params(put(table(1)), tx, mesh, 0)
    update = Update(grpo.make_loss(config, token_logps), tx, lambda step: rate, mesh)
    reference = put(table(2)) if fields.get("kl_coef") else None
    fixed = FixedLogps(token_logps, mesh, parts, reference is not None)
    batches = grpo.mini_batches(rows, len(rows), parts, collate)
    batches = [fixed.add_to(state.params, reference, batch) for batch in batches]
    losses = []
    for batch in batches:
        state, metrics = update(state, batch)
        losses.append(float(metrics["loss"]))
    return (
        losses,
        np.asarray(state.params["norm"]["weight"].addressable_data(0)),
        len(batches[0]["tokens"]),
    )
