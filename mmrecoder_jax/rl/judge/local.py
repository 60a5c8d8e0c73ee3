"""A judge on the accelerator: a Qwen2.5-VL directory read by our own loader, answering greedily
through our own sampler.

Pairs wait until the turn is complete (`finish`), then go through in batches of one static shape:
prompt, answer and images are padded to their buckets, the last batch is filled up, and every host
runs the same number of batches. It shares the device with the policy, so it does not overlap
decoding; a server does (`judge_http`).
"""

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmrecoder_jax.data.batching import Piece, VisionLayout, bucket, pad_prompts
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.config import ModelConfig
from mmrecoder_jax.models.processor import (
    IM_END,
    IM_START,
    VISION_END,
    VISION_START,
    Processor,
    Segment,
)
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL
from mmrecoder_jax.models.tokenizer import ChartTokenizer
from mmrecoder_jax.rl.judge.base import (
    PROMPT_AFTER,
    PROMPT_BEFORE,
    PROMPT_BETWEEN,
    Judge,
    Verdict,
    VerdictCache,
    verdict,
)
from mmrecoder_jax.rl.sampler import Sampler, SamplerSpec


class LocalJudge(Judge):
    """Judges with a model in this process.

    Args:
      name: identifies the model in the cache's key, e.g. its directory.
      model, params: as `weights.load_pretrained` gives them.
      tokenizer, processor: of that model; the processor bounds the size of the pictures.
      layout: what batching must know of that model on that mesh.
      mesh: where the parameters are.
      cache, max_failures: see `Judge`.
      batch_size: pairs judged at one time on one host; a multiple of the devices that share a
        batch.
      prompt_length, response_length: buckets of the question and of the answer, in tokens.
      windows: buckets of an image, in windows of the vision tower.
    """

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        params: Any,
        tokenizer: ChartTokenizer,
        processor: Processor,
        layout: VisionLayout,
        mesh: Mesh,
        cache: VerdictCache,
        *,
        max_failures: int,
        batch_size: int,
        prompt_length: int,
        response_length: int,
        windows: tuple[int, ...],
    ):
        sizes = f"{processor.min_pixels} {processor.max_pixels} {response_length}"
        super().__init__(
            "local",
            f"{name}\n{sizes}\n{PROMPT_BEFORE}\n{PROMPT_BETWEEN}\n{PROMPT_AFTER}",
            cache,
            max_failures,
        )
        self._params, self._tokenizer, self._processor = params, tokenizer, processor
        self._batch_size, self._prompt_length, self._windows = batch_size, prompt_length, windows
        self._layout = layout
        spec = SamplerSpec(
            response_length,
            forbidden=tuple(tokenizer.forbidden_ids(model.vocab_size)),
            eos_ids=tuple(tokenizer.eos_ids),
            pad_id=tokenizer.pad_id,
            temperature=0.0,
            chunk=response_length,
        )
        self.sampler = Sampler(Qwen25VL(model), spec, mesh)
        self._waiting: list[tuple[bytes, np.ndarray, Callable[[Verdict], None]]] = []
        self._waiting_lock = threading.Lock()

    def _ask(self, target: bytes, render: np.ndarray, answer: Callable[[Verdict], None]) -> None:
        with self._waiting_lock:
            self._waiting.append((target, render, answer))

    def finish(self) -> None:
        with self._waiting_lock:
            waiting, self._waiting = self._waiting, []
        questions, answers = [], []
        for target, render, answer in waiting:
            segment = self._question(target, render)
            if len(segment.ids) > self._prompt_length:
                answer(
                    Verdict(
                        None,
                        problem=f"a question of {len(segment.ids)} tokens exceeds judge.prompt_length={self._prompt_length}",
                    )
                )
                continue
            questions.append(segment)
            answers.append(answer)
        size = self._batch_size
        batches = -(-len(questions) // size)
        windows = max(
            (image.patches.shape[0] for segment in questions for image in segment.images), default=0
        )
        batches, windows = (int(x) for x in distributed.global_max(np.array([batches, windows])))
        if not batches:
            return
        windows = bucket(windows, self._windows, "an image's windows (data.windows)")
        for start in range(0, batches * size, size):
            batch = questions[start : start + size]
            texts = self._answers(batch, windows)
            for text, answer in zip(texts, answers[start : start + size], strict=True):
                answer(verdict(text))

    def _answers(self, batch: list[Segment], windows: int) -> list[str]:
        """The answers to at most `batch_size` questions; the batch is filled up with questions that
        nobody reads.
        """
        filler = Segment(np.asarray(self._tokenizer.encode(f"{IM_START}user\n"), np.int32))
        pieces = [
            Piece.shown(segment)
            for segment in [*batch, *[filler] * (self._batch_size - len(batch))]
        ]
        prompts = pad_prompts(
            pieces,
            [()] * len(pieces),
            self._prompt_length,
            windows,
            2 * self._batch_size,
            self._layout,
        )
        state = self.sampler.prefill(
            self._params, prompts, slots=self._prompt_length + self.sampler.spec.response_length
        )
        _, responses = self.sampler.decode(
            self._params, state, range(self._batch_size), jax.random.key(0)
        )
        return [self._processor.decode(response.ids) for response in responses[: len(batch)]]

    def _question(self, target: bytes, render: np.ndarray) -> Segment:
        """The conversation up to the answer: both pictures in one user turn."""
        encode, images = (
            self._tokenizer.encode,
            (self._processor.image(target), self._processor.image(render)),
        )
        parts = (
            f"{IM_START}user\n{PROMPT_BEFORE}{VISION_START}",
            f"{VISION_END}{PROMPT_BETWEEN}{VISION_START}",
        )
        system = self._processor.system
        ids = [] if system is None else encode(f"{IM_START}system\n{system}{IM_END}\n")
        for part, image in zip(parts, images, strict=True):
            ids += [*encode(part), *[self._tokenizer.image_pad_id] * len(image.slots)]
        ids += encode(f"{VISION_END}{PROMPT_AFTER}{IM_END}\n{IM_START}assistant\n")
        return Segment(np.asarray(ids, np.int32), images)
