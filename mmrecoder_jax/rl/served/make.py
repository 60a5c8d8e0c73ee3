"""Who decodes the rollouts of a configuration."""

import enum
import os

from ml_collections import ConfigDict

from mmrecoder_jax.config import check_choice
from mmrecoder_jax.models.config import ModelConfig
from mmrecoder_jax.models.tokenizer import ChartTokenizer
from mmrecoder_jax.rl.decoder import Decoder
from mmrecoder_jax.rl.schedule import Run
from mmrecoder_jax.rl.served.dialects import Dialect, Sglang, Vllm
from mmrecoder_jax.rl.served.files import PolicyFiles
from mmrecoder_jax.rl.served.run import ServedDecoder
from mmrecoder_jax.rl.web import Address


class EngineKind(enum.StrEnum):
    """The values of `engine.kind`."""

    SAMPLER = "sampler"  # ours, on the devices of the learner
    SGLANG = "sglang"  # a server that speaks SGLang's /generate
    VLLM = "vllm"  # a server that speaks vLLM's /inference/v1/generate


DIALECTS: dict[EngineKind, type[Dialect]] = {EngineKind.SGLANG: Sglang, EngineKind.VLLM: Vllm}


def make_decoder(
    config: ConfigDict, workdir: str, sizes: ModelConfig, tokenizer: ChartTokenizer
) -> Decoder:
    """Who decodes, by `engine.kind`. A server's weights are written to `<workdir>/served`.

    Args:
      config: of an RL stage; the sections engine and processor are read.

    Raises:
      ConfigError: the kind does not exist.
    """
    engine, p = config.engine, config.processor
    check_choice("engine.kind", engine.kind, tuple(EngineKind))
    kind = EngineKind(engine.kind)
    if kind is EngineKind.SAMPLER:
        return Run
    address = Address(
        "engine",
        engine.url,
        engine.key_variable,
        engine.timeout_seconds,
        engine.retries,
        "check engine.url, engine.kind and the key's environment variable",
    )
    pixels = p.min_pixels, p.max_pixels
    files = PolicyFiles(os.path.join(workdir, "served"), sizes, tokenizer, pixels, p.system)
    return ServedDecoder(address, DIALECTS[kind](), engine.in_flight, files)
