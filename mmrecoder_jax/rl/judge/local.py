"""A judge on the accelerator: a published Qwen2.5-VL directory, our own model and sampler, greedy.

Pairs wait until the turn is complete (`finish`), then go through in batches of one static shape:
prompt, answer and images are padded to their buckets, the last batch is filled up, and every host
runs the same number of batches. The judge shares the device with the policy, so it does not overlap
decoding; a judge behind a server does (`http`).
"""

import threading
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
from mmrecoder_jax.rl.judge.answers import POINTS_QUESTION, Question, cut_off
from mmrecoder_jax.rl.judge.base import Answer, Judge, Verdict, VerdictCache
from mmrecoder_jax.rl.sampler import Response, Sampler, SamplerSpec


class LocalJudge(Judge):
    """Judges with a model in this process.

    Args:
      name: identifies the model in the cache's key, e.g. its directory.
      model, params: what `weights.load_pretrained` returns.
      tokenizer, processor: for that model; the processor bounds the size of the pictures.
      layout: what batching must know about that model on that mesh.
      mesh: where the parameters are.
      cache, max_failures: see `Judge`.
      batch_size: pairs judged at the same time on one host; a multiple of the devices that share a
        batch.
      prompt_length, response_length: buckets for the question and the answer, in tokens.
      windows: buckets for an image, in windows of the vision tower.
      asked: what the model is asked.
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
        asked: Question = POINTS_QUESTION,
    ):
        sizes = f"{processor.min_pixels} {processor.max_pixels} {response_length}"
        super().__init__(
            asked.judge("local"), f"{name}\n{sizes}\n{asked.prompt}", cache, max_failures
        )
        self._asked = asked
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
        self._waiting: list[tuple[bytes, np.ndarray, Answer]] = []
        self._waiting_lock = threading.Lock()

    def ask(self, target: bytes, render: np.ndarray, answer: Answer) -> None:
        with self._waiting_lock:
            self._waiting.append((target, render, answer))

    def finish(self) -> None:
        with self._waiting_lock:
            waiting, self._waiting = self._waiting, []
        questions, answers = [], []
        for target, render, answer in waiting:
            try:
                segment = question(self._processor, self._tokenizer, target, render, self._asked)
            except ValueError as error:
                answer(Verdict(None, problem=str(error), of_pair=True))
                continue
            problem, of_pair = self._too_large(segment)
            if problem:
                answer(Verdict(None, problem=problem, of_pair=of_pair))
                continue
            questions.append(segment)
            answers.append(answer)
        size = self._batch_size
        batches = -(-len(questions) // size)
        windows = max(
            (image.patches.shape[0] for segment in questions for image in segment.images), default=0
        )
        # hosts run one program together: all of them run as many batches as the busiest
        batches, windows = (int(x) for x in distributed.global_max(np.array([batches, windows])))
        if not batches:
            return
        windows = bucket(windows, self._windows, "an image's windows (data.windows)")
        for start in range(0, batches * size, size):
            responses = self._responses(questions[start : start + size], windows)
            for response, answer in zip(responses, answers[start : start + size], strict=True):
                answer(self._verdict(response))

    def _too_large(self, segment: Segment) -> tuple[str, bool]:
        """Why no bucket holds a question, "" where one does; and whether the render alone is why.

        Where two pictures like the target do not fit either, it is the configuration's fault.
        """
        target, render = segment.images
        windows = [image.patches.shape[0] for image in segment.images]
        if max(windows) > max(self._windows):
            problem = (
                f"an image of {max(windows)} windows exceeds the largest of "
                f"data.windows={self._windows}"
            )
            return problem, windows[0] <= max(self._windows)
        tokens = len(segment.ids)
        if tokens > self._prompt_length:
            with_target = tokens - len(render.slots) + len(target.slots)
            problem = (
                f"a question of {tokens} tokens exceeds judge.prompt_length={self._prompt_length}"
            )
            return problem, with_target <= self._prompt_length
        return "", False

    def _verdict(self, response: Response) -> Verdict:
        if not response.finished:
            return cut_off(self.sampler.spec.response_length)
        return self._asked.read(self._processor.decode(response.ids))

    def _responses(self, batch: list[Segment], windows: int) -> list[Response]:
        """The answers to at most `batch_size` questions.

        A batch always has `batch_size` rows, or its programs would compile again: the last one is
        filled up with questions whose answers nobody reads.
        """
        filler = Segment(np.asarray(self._tokenizer.encode(f"{IM_START}user\n"), np.int32))
        segments = [*batch, *[filler] * (self._batch_size - len(batch))]
        prompts = pad_prompts(
            [Piece.shown(segment) for segment in segments],
            [()] * len(segments),
            self._prompt_length,
            windows,
            2 * self._batch_size,
            self._layout,
        )
        responses = self.sampler.answer(
            self._params, prompts, range(self._batch_size), jax.random.key(0)
        )
        return responses[: len(batch)]


def question(
    processor: Processor,
    tokenizer: ChartTokenizer,
    target: bytes,
    render: np.ndarray,
    asked: Question = POINTS_QUESTION,
) -> Segment:
    """The conversation up to the answer: both pictures with our instructions in one user turn.

    Args:
      target: PNG bytes.
      render: uint8 pixels `[height, width, 3]`.
    """
    images = processor.image(target), processor.image(render)
    parts = (
        f"{IM_START}user\n{asked.before}{VISION_START}",
        f"{VISION_END}{asked.between}{VISION_START}",
    )
    system = processor.system
    ids = [] if system is None else tokenizer.encode(f"{IM_START}system\n{system}{IM_END}\n")
    for part, image in zip(parts, images, strict=True):
        ids += [*tokenizer.encode(part), *[tokenizer.image_pad_id] * len(image.slots)]
    ids += tokenizer.encode(f"{VISION_END}{asked.after}{IM_END}\n{IM_START}assistant\n")
    return Segment(np.asarray(ids, np.int32), images)
