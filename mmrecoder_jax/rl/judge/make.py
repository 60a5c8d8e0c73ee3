"""The judge that a configuration asks for."""

import enum
import os

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmrecoder_jax.config import ConfigError, check_choice, naming
from mmrecoder_jax.data.batching import VisionLayout
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.processor import Processor
from mmrecoder_jax.models.published import load_config
from mmrecoder_jax.models.sharding import host_ways, param_shardings
from mmrecoder_jax.models.tokenizer import load_tokenizer
from mmrecoder_jax.models.weights import load_pretrained
from mmrecoder_jax.rl.judge.answers import POINTS_QUESTION, Question
from mmrecoder_jax.rl.judge.base import Judge, VerdictCache
from mmrecoder_jax.rl.judge.differences import DIFFERENCES
from mmrecoder_jax.rl.judge.http import HttpJudge, Server
from mmrecoder_jax.rl.judge.local import LocalJudge
from mmrecoder_jax.rl.judge.visual import VisualJudge


class Asked(enum.StrEnum):
    """The values of `judge.question`."""

    POINTS = "points"  # of six dimensions, as the paper's judge of 72B gives them
    DIFFERENCES = "differences"  # with severities: what a small reward model can tell


QUESTIONS = {Asked.POINTS: POINTS_QUESTION, Asked.DIFFERENCES: DIFFERENCES}


class BackEnd(enum.StrEnum):
    """The values of `reward.judge`."""

    NONE = "none"  # no judge; reward.beta must be 0
    HTTP = "http"  # a vision model behind any OpenAI-compatible server
    LOCAL = "local"  # a Qwen2.5-VL directory through our own model and sampler
    VISUAL = "visual"  # no model: a fixed similarity of the pixels, without dimensions


def make_judge(config: ConfigDict, workdir: str, mesh: Mesh) -> Judge | None:
    """The judge of `reward.judge`, or None for "none"; close it (it is a context manager).

    Its scores are kept in `<workdir>/judge`, in one file per host.

    Args:
      config: of an RL stage or of an evaluation; the sections reward, judge, data, model and
        processor are read.
      workdir: the work directory of the run.
      mesh: a local judge puts its parameters there.

    Raises:
      ConfigError: the back end does not exist or lacks what it needs.
    """
    check_choice("reward.judge", config.reward.judge, tuple(BackEnd))
    back_end = BackEnd(config.reward.judge)
    if back_end is BackEnd.NONE:
        return None
    cache = VerdictCache(os.path.join(workdir, "judge"), str(jax.process_index()))
    match back_end:
        case BackEnd.VISUAL:
            return VisualJudge(cache)
        case BackEnd.LOCAL:
            return _local_judge(config, mesh, cache)
        case BackEnd.HTTP:
            return _http_judge(config, cache)


def _http_judge(config: ConfigDict, cache: VerdictCache) -> HttpJudge:
    judge = config.judge
    server = Server(
        judge.url,
        judge.model,
        judge.key_variable,
        judge.in_flight,
        judge.timeout_seconds,
        judge.retries,
        judge.max_tokens,
    )
    return HttpJudge(server, cache, judge.max_failures, _question(config))


def _local_judge(config: ConfigDict, mesh: Mesh, cache: VerdictCache) -> LocalJudge:
    judge, p = config.judge, config.processor
    if not judge.path:
        raise ConfigError(
            "judge.path='': reward.judge='local' needs a directory with a Qwen2.5-VL model"
        )
    # a judge is never trained: its parameters need no master copy in a wider type
    switches = {"dtype": config.model.dtype, "param_dtype": config.model.dtype, "remat": "none"}
    with naming("judge.path"):
        tokenizer = load_tokenizer(judge.path, load_config(judge.path).vocab_size)
        with distributed.together():  # a damaged shard is on the hosts that read it
            sizes, params = load_pretrained(
                judge.path, lambda tree: param_shardings(tree, mesh), **switches
            )
    layout = VisionLayout.of(sizes, tokenizer.image_pad_id, tokenizer.pad_id, host_ways(mesh))
    return LocalJudge(
        judge.path,
        sizes,
        params,
        tokenizer,
        Processor(tokenizer, sizes.vision, p.min_pixels, p.max_pixels, p.system),
        layout,
        mesh,
        cache,
        max_failures=judge.max_failures,
        batch_size=judge.batch_size,
        prompt_length=judge.prompt_length,
        response_length=judge.max_tokens,
        windows=tuple(config.data.windows),
        asked=_question(config),
    )


def _question(config: ConfigDict) -> Question:
    check_choice("judge.question", config.judge.question, tuple(Asked))
    return QUESTIONS[Asked(config.judge.question)]
