"""Numbers of a training configuration that do not fit together, before anything heavy starts.

What each field may be by itself is in `fields`; what depends on hosts and devices is checked where
they are known (`rl.learner_batch.check_rl`, `sft.train`).
"""

from ml_collections import ConfigDict

from mmrecoder_jax.config import RL_STAGES, ConfigError
from mmrecoder_jax.models.config import ModelConfig, VisionConfig
from mmrecoder_jax.monitoring.measured import check_best


def check_config(config: ConfigDict, vision: VisionConfig) -> None:
    """Checks a training stage's images and conversations against its buckets.

    Args:
      config: of one stage that trains.
      vision: sizes of the model's vision tower.

    Raises:
      ConfigError: names the first field that cannot work, its value and the remedy.
    """
    _check_images(config, vision)
    _check_tokens(config)
    check_best(config)
    if config.stage in RL_STAGES:
        _check_conversations(config)
        _check_rewards(config.reward)
        _check_objective(config.rl)
        _check_divergence(config.rl)
        _check_credit(config)
        _check_engine(config, vision)


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


def vanishing(config: ConfigDict, sizes: ModelConfig) -> str:
    """What there is to say of steps that are too small for the type of the weights; "" otherwise.

    A step of Adam or muon is about lr for each weight, and a weight of a layer is about
    1 / sqrt(width).
    """
    optim = config.optim
    weight = sizes.hidden_size**-0.5
    least = weight * 2.0**-9  # half of the distance between two numbers of bfloat16 there
    if sizes.param_dtype != "bfloat16" or optim.rounding != "nearest" or optim.lr >= least:
        return ""
    return (
        f"optim.lr={optim.lr} is below {least:.1e}, which bfloat16 weights of {weight:.2g} round "
        "away: most will never move. Set --config.optim.rounding=stochastic or "
        "--config.model.param_dtype=float32"
    )


def _check_tokens(config: ConfigDict) -> None:
    most, longest = config.train.micro_tokens, max(config.data.lengths)
    if 0 < most < longest:
        raise ConfigError(
            f"train.micro_tokens={most} cannot hold a row of data.lengths={longest} tokens: use "
            f"{longest} or more, or 0 for as many as train.micro_batch_size rows have"
        )


def _check_conversations(config: ConfigDict) -> None:
    rl = config.rl
    if config.stage == "stage1" and rl.turns < 2:
        raise ConfigError(
            f"rl.turns={rl.turns} in stage1, which trains the turns after a shared first one: use "
            "2 or more, or --config=stage2"
        )
    needed = rl.prompt_length + rl.turns * rl.response_length + (rl.turns - 1) * rl.feedback_length
    if max(config.data.lengths) < needed:
        raise ConfigError(
            f"data.lengths={tuple(config.data.lengths)} cannot hold rl.turns={rl.turns} turns: "
            f"rl.prompt_length + turns * rl.response_length + (turns - 1) * rl.feedback_length = "
            f"{needed}; add a bucket of {needed}, or lower one of these"
        )


def _check_objective(rl: ConfigDict) -> None:
    """Raises ConfigError for options of the loss that contradict each other, or do nothing."""
    if rl.objective == "gspo" and rl.aggregation != "sequence_mean":
        raise ConfigError(
            f"rl.objective='gspo' weighs rows alike, but rl.aggregation={rl.aggregation!r}: set "
            "--config.rl.aggregation=sequence_mean"
        )
    if rl.clip_dual and rl.clip_dual <= 1 + rl.clip_high:
        raise ConfigError(
            f"rl.clip_dual={rl.clip_dual} must be above 1 + rl.clip_high={1 + rl.clip_high:g}, "
            "where the ratio is clipped already; 3 is usual, 0 is off"
        )
    once = rl.updates_per_batch * rl.mini_batches == 1
    if rl.clip_dual and (rl.objective == "cispo" or once):
        why = "a weight" if rl.objective == "cispo" else "1 in the only update of a batch"
        raise ConfigError(
            f"rl.clip_dual={rl.clip_dual} bounds a ratio, which is {why}: set it to 0, or "
            "rl.objective=grpo and rl.updates_per_batch=2 or more"
        )
    if rl.resample and (rl.ahead or rl.partial):
        raise ConfigError(
            f"rl.resample={rl.resample} draws a step's silent groups again, which rl.ahead="
            f"{rl.ahead}, rl.partial={rl.partial} draw over several steps: set both to 0, or "
            "rl.resample to 0"
        )
    if rl.overlong >= rl.response_length:
        raise ConfigError(
            f"rl.overlong={rl.overlong} must be below rl.response_length={rl.response_length}: "
            "it is the end of a response that is penalised"
        )


def _check_divergence(rl: ConfigDict) -> None:
    """Raises ConfigError for options of the divergence that do nothing."""
    for name, off in (("kl_in", "loss"), ("reference_every", 0)):
        if rl[name] != off and not rl.kl_coef:
            raise ConfigError(
                f"rl.{name}={rl[name]!r} is of a divergence that rl.kl_coef=0 leaves out: set "
                f"--config.rl.kl_coef=0.01 or so, or rl.{name}={off}"
            )
    once = rl.updates_per_batch * rl.mini_batches == 1
    if rl.reference_every == 1 and (once or rl.kl_in == "reward"):
        raise ConfigError(
            "rl.reference_every=1 makes each step's own policy its reference, from which it never "
            "diverges: use 2 or more, or 0 for the policy of init_from"
        )
    if rl.kl == "k1" and rl.kl_in == "loss":
        raise ConfigError(
            "rl.kl='k1' in the loss has a gradient of 0 on average: set --config.rl.kl_in=reward, "
            "or rl.kl=k2"
        )


def _check_credit(config: ConfigDict) -> None:
    reward = config.reward
    if config.rl.credit == "turn" and (reward.gamma or reward.eta):
        raise ConfigError(
            f"rl.credit='turn' weighs each turn by its own reward, but reward.gamma={reward.gamma} "
            f"and reward.eta={reward.eta} make one of all turns: set both to 0, or "
            "rl.credit=trajectory"
        )


def _check_rewards(reward: ConfigDict) -> None:
    if reward.alpha + reward.beta > 1:
        raise ConfigError(
            f"reward.alpha={reward.alpha} and reward.beta={reward.beta} leave "
            f"{1 - reward.alpha - reward.beta:g} for the format: their sum is 1 or less"
        )
    if reward.beta and reward.judge == "none":
        raise ConfigError(
            f"reward.beta={reward.beta} needs a judge, but reward.judge is 'none': "
            "set --config.reward.beta=0"
        )


def _check_engine(config: ConfigDict, vision: VisionConfig) -> None:
    """Raises ConfigError where a server of rollouts could not decode as our sampler does."""
    kind, rl = config.engine.kind, config.rl
    if kind == "sampler":
        return
    for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
        if rl[name] != off:
            raise ConfigError(
                f"rl.{name}={rl[name]} with engine.kind={kind!r}: servers say no log-probability "
                f"of what is left; set it to {off}, or engine.kind='sampler'"
            )
    least = 4 * (vision.patch_size * vision.spatial_merge_size) ** 2
    if config.processor.min_pixels < least:
        raise ConfigError(
            f"processor.min_pixels={config.processor.min_pixels} with engine.kind={kind!r}: "
            f"servers enlarge pictures to {least} pixels or more; use that"
        )
