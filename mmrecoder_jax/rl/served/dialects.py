"""How servers are asked for one response, and told of new weights.

    prompt      a b # # # # c d     our ids: `#` once per visual token
    compact     a b # c d           what is sent: `#` once per picture; the server repeats it
    pictures    PNG                 already resized, so that the server's own resize changes nothing

A server's probabilities must be those of the policy (`rl.sampler.sample`): the model at its
temperature, without forbidden ids. Those get a bias of -100 to their logits; every other setting of
a server that would bend the distribution is sent as off. Whatever a server answers is data from
outside: `checked` takes nothing on trust.

The facts are from the sources and documentation of SGLang (later than 0.5.12, which would tokenise
prompts anew) and of vLLM (September 2026, with `content_parts`).
"""

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from mmrecoder_jax.rl.sampler import Response, SamplerSpec
from mmrecoder_jax.rl.web import BadAnswer

FORBIDDEN_BIAS = -100.0  # added to the logits of ids that are never sampled
_ABOVE_ZERO = 1e-3  # nats by which rounding may lift a log-probability above 0


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as it travels.

    Attributes:
      url: a data URL with the PNG.
      name: of its content, hexadecimal.
    """

    url: str
    name: str

    @classmethod
    def of(cls, png: bytes) -> "Picture":
        data = base64.b64encode(png).decode()
        return cls(f"data:image/png;base64,{data}", hashlib.sha256(png).hexdigest())

    def under(self, version: str) -> str:
        """A name, hexadecimal, for what weights of this version see in the picture: servers keep
        features of pictures by name, also when their weights change.
        """
        return hashlib.sha256(f"{version} {self.name}".encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Question:
    """What a server is asked.

    Attributes:
      ids: of the conversation so far, a placeholder per visual token.
      image_id: the placeholder.
      pictures: of the conversation so far, in order.
      limit: longest response, in tokens.
      seed: of its random numbers, below 2**31.
      version: of the weights that it is to be answered with.
    """

    ids: Int[np.ndarray, " L"]
    image_id: int
    pictures: tuple[Picture, ...]
    limit: int
    seed: int
    version: str

    @property
    def compact(self) -> list[int]:
        """The ids with one placeholder per picture."""
        pads = self.ids == self.image_id
        again = pads & np.concatenate([[False], pads[:-1]])
        return self.ids[~again].tolist()


@dataclasses.dataclass(frozen=True)
class Order:
    """A step of loading weights: what is posted where.

    Attributes:
      confirmed: whether the answer says `"success": true`, beside its status.
    """

    path: str
    body: Mapping[str, Any]
    confirmed: bool = False


@dataclasses.dataclass(frozen=True)
class Written:
    """What a server says that it wrote, unchecked."""

    ids: list[Any]
    logps: list[Any]


@runtime_checkable
class Dialect(Protocol):
    """One kind of server."""

    path: str  # that a question is posted to

    def question(self, question: Question, spec: SamplerSpec) -> dict[str, Any]:
        """The body of a question."""
        ...

    def read(self, answer: Any, question: Question) -> Written:
        """What is in an answer, which is any JSON.

        Raises:
          BadAnswer: it is no answer, or to another question.
        """
        ...

    def loading(self, directory: str, version: str) -> list[Order]:
        """What makes the server load a Hugging Face directory."""
        ...


class Sglang:
    """SGLang's own `/generate`."""

    path = "/generate"

    def question(self, question: Question, spec: SamplerSpec) -> dict[str, Any]:
        names = [picture.under(question.version) for picture in question.pictures]
        pictures = {"image_data": [p.url for p in question.pictures], "mm_hashes": names}
        return {
            "input_ids": question.compact,
            **(pictures if names else {}),
            "sampling_params": {
                **_even(spec),
                "max_new_tokens": question.limit,
                "min_new_tokens": 0,
                "top_k": -1,
                "stop_token_ids": list(spec.eos_ids),
                "no_stop_trim": True,
                "skip_special_tokens": False,
                "sampling_seed": question.seed,
            },
            "return_logprob": True,
            "logprob_start_len": -1,
            "stream": False,
        }

    def read(self, answer: Any, question: Question) -> Written:
        about = _field(answer, "meta_info", dict)
        _check_length(_field(about, "prompt_tokens", int), question)
        version = about.get("weight_version", question.version)
        if version != question.version:
            raise BadAnswer(
                f"it answers with weights {str(version)[:40]!r} instead of {question.version!r}: "
                "it was started again, or another run uses it"
            )
        triples = _field(about, "output_token_logprobs", list)
        if not all(isinstance(triple, list) and len(triple) >= 2 for triple in triples):
            raise BadAnswer("its output_token_logprobs are not (log-probability, id, text)")
        ids = _field(answer, "output_ids", list)
        if ids != [triple[1] for triple in triples]:
            raise BadAnswer(
                f"it has {len(ids)} output_ids, and log-probabilities of {len(triples)} others"
            )
        return Written(ids, [triple[0] for triple in triples])

    def loading(self, directory: str, version: str) -> list[Order]:
        body = {"model_path": directory, "weight_version": version, "flush_cache": True}
        return [Order("/update_weights_from_disk", body, confirmed=True)]


class Vllm:
    """vLLM's tokens in, tokens out. The server needs `--enable-scale-out`,
    `--logprobs-mode processed_logprobs`, and `VLLM_SERVER_DEV_MODE=1` to load weights.
    """

    path = "/inference/v1/generate"

    def question(self, question: Question, spec: SamplerSpec) -> dict[str, Any]:
        parts = [
            {"type": "image_url", "url": picture.url, "uuid": picture.under(question.version)}
            for picture in question.pictures
        ]
        return {
            "token_ids": question.compact,
            **({"content_parts": parts} if parts else {}),
            "sampling_params": {
                **_even(spec),
                "max_tokens": question.limit,
                "min_tokens": 0,
                "top_k": 0,
                "stop_token_ids": list(spec.eos_ids),
                "seed": question.seed,
                "logprobs": 0,
                "detokenize": False,
            },
            "return_token_ids": True,
            "stream": False,
        }

    def read(self, answer: Any, question: Question) -> Written:
        seen = _field(answer, "prompt_token_ids", list)
        _check_length(len(seen), question)
        if seen != question.ids.tolist():
            raise BadAnswer("the prompt that it read has other ids than were sent")
        choices = _field(answer, "choices", list)
        if len(choices) != 1:
            raise BadAnswer(f"it has {len(choices)} choices for one question")
        ids = _field(choices[0], "token_ids", list)
        content = _field(_field(choices[0], "logprobs", dict), "content", list)
        if ids != [_field(entry, "token_id", int) for entry in content]:
            raise BadAnswer(
                f"it has {len(ids)} token_ids, and log-probabilities of {len(content)} others"
            )
        return Written(ids, [_field(entry, "logprob", int | float) for entry in content])

    def loading(self, directory: str, version: str) -> list[Order]:
        reload = {"method": "reload_weights", "kwargs": {"weights_path": directory}}
        return [
            Order("/collective_rpc", reload),
            Order("/reset_prefix_cache", {}),
            Order("/reset_encoder_cache", {}),
        ]


def parsed(answer: bytes) -> Any:
    """The JSON of an answer; raises BadAnswer where it is none."""
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        raise BadAnswer(f"an answer of {len(answer)} bytes that is no JSON") from None


def checked(written: Written, question: Question, spec: SamplerSpec, vocab_size: int) -> Response:
    """The response; `finished` where an end token ends it.

    Raises:
      BadAnswer: an id or a log-probability cannot be one, their numbers differ, or the response
        ends neither by an end token nor at its limit.
    """
    ids, logps = written.ids, written.logps
    if not 0 < len(ids) <= question.limit:
        raise BadAnswer(f"a response of {len(ids)} tokens; asked were 1 to {question.limit}")
    if len(logps) != len(ids):
        raise BadAnswer(f"{len(ids)} tokens with {len(logps)} log-probabilities")
    never = set(spec.forbidden)
    for place, (token, logp) in enumerate(zip(ids, logps, strict=True)):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise BadAnswer(
                f"token {place} is {str(token)[:40]}, and ids are from 0 to {vocab_size - 1}"
            )
        if token in never:
            raise BadAnswer(f"token {place} is {token}, which is never sampled")
        if type(logp) not in (int, float) or not math.isfinite(logp) or logp > _ABOVE_ZERO:
            raise BadAnswer(f"token {place} has the log-probability {str(logp)[:40]}")
    ends = [place for place, token in enumerate(ids) if token in spec.eos_ids]
    if ends and ends[0] != len(ids) - 1:
        raise BadAnswer(f"it goes on behind its end token {ids[ends[0]]} at {ends[0]}")
    if not ends and len(ids) < question.limit:
        raise BadAnswer(
            f"it ends without an end token after {len(ids)} of at most {question.limit} tokens"
        )
    rounded = np.minimum(np.asarray(logps, np.float32), 0)
    return Response(np.asarray(ids, np.int32), rounded, bool(ends), rounded)


def until_stop(response: Response, stops: Iterable[tuple[int, ...]]) -> Response:
    """The response up to the end of its first stop sequence, where it has one."""
    ids = response.ids.tolist()
    ends = [
        place + len(stop)
        for stop in stops
        for place in range(len(ids) - len(stop) + 1)
        if tuple(ids[place : place + len(stop)]) == stop
    ]
    if not ends:
        return response
    end = min(ends)
    logps = response.logps[:end]
    return Response(response.ids[:end], logps, True, logps)


def _even(spec: SamplerSpec) -> dict[str, Any]:
    """Settings by the same names everywhere: the policy as it is, without forbidden ids."""
    return {
        "n": 1,
        "temperature": spec.temperature,
        "top_p": 1.0,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": False,
        "logit_bias": {str(token): FORBIDDEN_BIAS for token in spec.forbidden},
    }


def _field(value: Any, name: str, kind: Any) -> Any:
    """A field of an object; raises BadAnswer where it is missing or of another kind."""
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise BadAnswer(f"its {name} is missing or of a wrong type")
    return found


def _check_length(count: int, question: Question) -> None:
    if count != len(question.ids):
        raise BadAnswer(
            f"it read a prompt of {count} tokens where {len(question.ids)} were meant: its image "
            "processor resizes pictures, or it tokenises prompts anew"
        )
