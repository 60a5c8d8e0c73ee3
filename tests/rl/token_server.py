"""A server on the loopback interface that takes token ids and pictures and answers with token ids:
the protocols of SGLang and of vLLM, as far as rollouts need them.

`Transformers` (torch) decodes with the weights that it is told to load, `Scripted` writes the same
token again and again.
"""

import base64
import http.server
import io
import json
import socket
import threading
import time

import numpy as np
from PIL import Image


class Scripted:
    """Writes token 5 up to the limit; loads nothing."""

    def __init__(self, image_id):
        self.image_id = image_id

    def load(self, directory):
        pass

    def write(self, compact, pictures, limit, seed, asked):
        counts = iter([(p.width // 28) * (p.height // 28) for p in pictures])
        prompt = []
        for token in compact:
            prompt += [token] * (next(counts) if token == self.image_id else 1)
        return prompt, [5] * limit, [-1.0] * limit


class Transformers:
    """The reference implementation, in float32."""

    def __init__(self):
        self._lock = threading.Lock()

    def load(self, directory):
        import torch
        from transformers import Qwen2_5_VLForConditionalGeneration

        from tests.models.image_processor import Qwen2VLImageProcessorPil

        with self._lock:
            self._model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            self._images = Qwen2VLImageProcessorPil.from_pretrained(directory)

    def write(self, compact, pictures, limit, seed, asked):
        """(prompt with a placeholder per visual token, new ids, their log-probabilities)."""
        import torch

        with self._lock, torch.no_grad():
            image_id = self._model.config.image_token_id
            counts, inputs = iter(()), {}
            if pictures:
                read = self._images(pictures, return_tensors="np")
                inputs = {
                    name: torch.from_numpy(np.array(read[name]))
                    for name in ("pixel_values", "image_grid_thw")
                }
                counts = iter((inputs["image_grid_thw"].prod(1) // 4).tolist())
            prompt = []
            for token in compact:
                prompt += [token] * (next(counts) if token == image_id else 1)
            inputs["input_ids"] = torch.tensor([prompt])
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_id).int()
            torch.manual_seed(seed)
            added = torch.zeros(self._model.lm_head.out_features)
            for token, value in asked["logit_bias"].items():
                added[int(token)] = value
            temperature = asked["temperature"]
            out = self._model.generate(
                **inputs,
                max_new_tokens=limit,
                logits_processor=[lambda ids, scores: scores + added],
                eos_token_id=asked["stop_token_ids"],
                pad_token_id=asked["stop_token_ids"][-1],
                **({"temperature": temperature} if temperature else {}),
                do_sample=bool(temperature),
                top_k=0,
                top_p=1.0,
                return_dict_in_generate=True,
                output_scores=True,
            )
        ids = out.sequences[0, len(prompt) :].tolist()
        logps = [
            float(torch.log_softmax(scores[0], -1)[token])
            for scores, token in zip(out.scores, ids, strict=True)
        ]
        return prompt, ids, logps


class TokenServer:
    """Serves what an engine writes; a context manager.

    It goes wrong as it is told: `fault(number, path)` -> None, or (status, headers, body bytes,
    seconds to wait) in place of the answer to request `number`, counted from 0; body None hangs,
    and a status of 0 cuts the connection. `spoil(answer)` changes an answer that it would give.

    Attributes:
      requests: (path, body) of each.
      loaded: directories, in order.
      version: of the weights, as the last update named it.
    """

    def __init__(self, engine):
        self.engine = engine
        self.fault = lambda number, path: None
        self.spoil = lambda answer: answer
        self.requests, self.headers, self.loaded = [], [], []
        self.version = "default"
        self.most_at_once = self._now = 0
        self._count = threading.Lock()
        self._end = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                server._serve(self)

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *args: None
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *exc):
        self._end.set()
        self._server.shutdown()
        self._server.server_close()

    def paths(self):
        return [path for path, _ in self.requests]

    def questions(self):
        """Bodies that asked for tokens."""
        return [body for path, body in self.requests if "generate" in path]

    def _serve(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._count:
            number = len(self.requests)
            self.requests.append((handler.path, body))
            self.headers.append(dict(handler.headers))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            wrong = self.fault(number, handler.path)
            if wrong is None:
                answer = self.spoil(self._answer(handler.path, body))
                wrong = 200, {}, json.dumps(answer).encode(), 0.0
        except Exception as problem:
            wrong = 400, {}, f"{type(problem).__name__}: {problem}".encode(), 0.0
        finally:
            with self._count:
                self._now -= 1
        status, headers, text, seconds = wrong
        time.sleep(seconds)
        if text is None:
            self._end.wait(20)
            return
        if not status:
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(text)

    def _answer(self, path, body):
        match path:
            case "/generate":
                return self._sglang(body)
            case "/inference/v1/generate":
                return self._vllm(body)
            case "/update_weights_from_disk":
                self._load(body["model_path"])
                self.version = body["weight_version"]
                return {"success": True, "message": "done", "num_paused_requests": 0}
            case "/collective_rpc":
                assert body["method"] == "reload_weights"
                self._load(body["kwargs"]["weights_path"])
                return {"results": [None]}
            case "/reset_prefix_cache" | "/reset_encoder_cache":
                return {}
        raise ValueError(f"no {path} here")

    def _load(self, directory):
        self.engine.load(directory)
        self.loaded.append(directory)

    def _sglang(self, body):
        asked = body["sampling_params"]
        prompt, ids, logps = self._written(
            body["input_ids"],
            body.get("image_data", []),
            asked["max_new_tokens"],
            asked["sampling_seed"],
            asked,
        )
        last = ids[-1] in asked["stop_token_ids"]
        reason = {"type": "stop", "matched": ids[-1]} if last else {"type": "length"}
        return {
            "text": "",
            "output_ids": ids,
            "meta_info": {
                "finish_reason": reason,
                "prompt_tokens": len(prompt),
                "weight_version": self.version,
                "output_token_logprobs": [
                    [logp, token, None] for logp, token in zip(logps, ids, strict=True)
                ],
            },
        }

    def _vllm(self, body):
        asked = body["sampling_params"]
        urls = [part["url"] for part in body.get("content_parts", [])]
        prompt, ids, logps = self._written(
            body["token_ids"], urls, asked["max_tokens"], asked["seed"], asked
        )
        content = [
            {"token_id": token, "logprob": logp, "rank": 1, "top_logprobs": []}
            for token, logp in zip(ids, logps, strict=True)
        ]
        choice = {"index": 0, "token_ids": ids, "logprobs": {"content": content}}
        return {"request_id": "x", "prompt_token_ids": prompt, "choices": [choice]}

    def _written(self, compact, urls, limit, seed, asked):
        for name, off in (("top_p", 1.0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
            assert asked[name] == off
        pngs = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]
        pictures = [Image.open(io.BytesIO(png)) for png in pngs]
        return self.engine.write(compact, pictures, limit, seed, asked)
