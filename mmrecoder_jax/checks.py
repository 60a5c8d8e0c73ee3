"""What is wrong with a training configuration by its numbers alone, before anything heavy starts.

What depends on hosts and devices is checked where they are known (`rl.learner_batch.check_rl`,
`sft.train`).
"""

from ml_collections import ConfigDict

from mmrecoder_jax.config import RL_STAGES, ConfigError
from mmrecoder_jax.models.config import VisionConfig


def check_config(config: ConfigDict, vision: VisionConfig) -> None:
    """Checks a training stage's optimizer, batches, images and conversations.

    Args:
      config: of one stage that trains.
      vision: sizes of the model's vision tower.

    Raises:
      ConfigError: names the first field that cannot work, its value and the remedy.
    """
    _check_optimizer(config.optim)
    for field in ("batch_size", "micro_batch_size"):
        if config.train[field] < 1:
            raise ConfigError(f"train.{field}={config.train[field]}: use 1 or more rows")
    _check_images(config, vision)
    if config.stage in RL_STAGES:
        _check_conversations(config)


def _check_optimizer(optim: ConfigDict) -> None:
    # Written so that NaN is refused as well.
    if not optim.lr >= 0:
        raise ConfigError(f"optim.lr={optim.lr}: a learning rate is 0 or more, such as 1e-5")
    for field in ("b1", "b2"):
        if not 0 <= optim[field] < 1:
            raise ConfigError(f"optim.{field}={optim[field]}: use 0 or more and less than 1")
    if not optim.weight_decay >= 0:
        raise ConfigError(f"optim.weight_decay={optim.weight_decay}: use 0 for none, or more")
    if not optim.clip > 0:
        raise ConfigError(
            f"optim.clip={optim.clip}: the largest norm of the gradients is above 0; a large one "
            "(1e9) clips nothing"
        )
    if optim.warmup_steps < 0:
        raise ConfigError(f"optim.warmup_steps={optim.warmup_steps}: use 0 for none, or more")
    if optim.max_skipped < 1:
        raise ConfigError(
            f"optim.max_skipped={optim.max_skipped}: use 1 to end at the first update that is not "
            "finite, or more"
        )


def _check_images(config: ConfigDict, vision: VisionConfig) -> None:
    """Raises ConfigError where an image of the largest area cannot become windows."""
    least, most = config.processor.min_pixels, config.processor.max_pixels
    cell = (vision.patch_size * vision.spatial_merge_size) ** 2
    if most < cell:
        raise ConfigError(
            f"processor.max_pixels={most} is below one visual token: use {cell} "
            "(28 x 28 pixels) or more"
        )
    if least > most:
        raise ConfigError(
            f"processor.min_pixels={least} is above processor.max_pixels={most}: lower the first "
            "or raise the second"
        )
    # Few images fill their windows, so this is the least that is needed.
    needed = -(-(most // cell) * vision.merge_patches // vision.window_patches)
    if max(config.data.windows) < needed:
        raise ConfigError(
            f"data.windows={tuple(config.data.windows)} cannot hold an image of "
            f"processor.max_pixels={most}, which takes {needed} windows or more: add a larger "
            "bucket, or lower processor.max_pixels"
        )


def _check_conversations(config: ConfigDict) -> None:
    rl = config.rl
    if not rl.temperature > 0:
        raise ConfigError(
            f"rl.temperature={rl.temperature}: training samples at a temperature above 0, "
            "such as 1.0; greedy answers (0) are all alike and teach nothing"
        )
    if rl.group < 2:
        raise ConfigError(
            f"rl.group={rl.group}: an advantage compares answers to one prompt; use 2 or more"
        )
    if rl.turns < 1:
        raise ConfigError(f"rl.turns={rl.turns}: use 1 or more")
    if config.stage == "stage1" and rl.turns < 2:
        raise ConfigError(
            f"rl.turns={rl.turns} in stage1, which trains the turns after a shared first one: use "
            "2 or more, or configs/stage2.py"
        )
    needed = rl.prompt_length + rl.turns * rl.response_length + (rl.turns - 1) * rl.feedback_length
    if max(config.data.lengths) < needed:
        raise ConfigError(
            f"data.lengths={tuple(config.data.lengths)} cannot hold rl.turns={rl.turns} turns: "
            f"rl.prompt_length + turns * rl.response_length + (turns - 1) * rl.feedback_length = "
            f"{needed}; add a bucket of {needed}, or lower one of these"
        )
