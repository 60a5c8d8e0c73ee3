"""What a resumed run must share with the run that it goes on.

A checkpoint's note holds every field that decides numbers, and digests of the data and of the
weights that the run began with. A resumed run compares them before it loads anything. What only
says how the work is done (`FREE`) may differ: another mesh, another number of workers, more steps.

    note = {"fields": {"train.batch_size": 128, ...}, "digests": {"data.dir": "5f1c...", ...}}
"""

import fnmatch
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mmrecoder_jax import places
from mmrecoder_jax.config import ConfigError, field_names

# Patterns of fields that a resumed run may change. What comes of paths and of counts of charts is
# compared by digest, so that moved directories are no change and rewritten ones are.
FREE = (
    *("size", "init_from", "data.dir", "data.dialogues", "data.kind", "data.seed", "data.*_count"),
    *("data.max_bad_rows", "dialogues.*", "train.steps", "train.epochs", "train.micro_*"),
    *("train.log_every", "train.eval_*", "optim.max_skipped", "checkpoint.*", "log.*", "alarms.*"),
    *("model.remat", "model.attention", "model.scan_unroll", "model.loss_chunk", "mesh.*"),
    *("rl.decode_chunk", "rl.rollout_prompts", "rl.trajectories_*", "rl.eval_*"),
    *("judge.*", "env.*"),
    *("engine.url", "engine.key_variable", "engine.in_flight", "engine.timeout_seconds"),
    *("engine.retries",),
)


def note_of(config: ConfigDict, digests: Mapping[str, str]) -> dict[str, Any]:
    """What a checkpoint keeps of the run, as plain JSON.

    Args:
      digests: of data and weights, by the field that names them.
    """
    values = json.loads(places.shown(config.to_json_best_effort()))
    fields = {
        name: _value(values, name)
        for name in field_names(config)
        if not isinstance(_value(values, name), dict)
        and not any(fnmatch.fnmatch(name, pattern) for pattern in FREE)
    }
    return {"fields": fields, "digests": dict(digests)}


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two notes, a phrase for each; a field that one lacks is no difference:
    versions add fields.
    """
    found = [
        f"{name}={now['fields'][name]!r} (was {value!r})"
        for name, value in saved["fields"].items()
        if name in now["fields"] and now["fields"][name] != value
    ]
    found += [
        f"{name} holds something else than it did"
        for name, value in saved["digests"].items()
        if name in now["digests"] and now["digests"][name] != value
    ]
    return found


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], where: str, accept: bool) -> str:
    """Says what differs from the run that is resumed; an empty text where nothing does.

    Args:
      where: what messages call the checkpoint.
      accept: whether a difference may be.

    Raises:
      ConfigError: something differs and may not.
    """
    found = changes(saved, now)
    if not found:
        return ""
    listed = ", ".join(found)
    if not accept:
        raise ConfigError(
            f"{where} is of a run with other settings: {listed}; set them back, use another "
            "--workdir, or accept the change with --config.checkpoint.accept_changes=True"
        )
    return f"resumed with other settings than {where} has: {listed}"


def _value(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values
