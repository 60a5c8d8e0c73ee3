"""The policy as a Hugging Face directory that a server loads.

<workdir>/served/policy-000017     the newest, and the one before
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.config import ModelConfig
from mmrecoder_jax.models.export import export_policy
from mmrecoder_jax.models.lora import merge
from mmrecoder_jax.models.tokenizer import ChartTokenizer
from mmrecoder_jax.models.weights import to_tensors

KEPT = 2  # directories; a server may still read the one before the newest
_NAME = re.compile(r"policy-(\d{6,})")


class PolicyFiles:
    """Writes policies below a directory, each whole or not at all.

    Args:
      pixels: least and most pixels of an image after resizing.
      system: the system message of the run.
    """

    def __init__(
        self,
        directory: str,
        sizes: ModelConfig,
        tokenizer: ChartTokenizer,
        pixels: tuple[int, int],
        system: str | None,
    ):
        self._directory, self._sizes = Path(directory).absolute(), sizes
        self._tokenizer, self._pixels, self._system = tokenizer, pixels, system

    def write(self, params: Any) -> Path:
        """The directory of this policy, in the type of compute; adapters are merged.

        All hosts call this together; the main one writes.

        Raises:
          OSError: the policy cannot be written.
        """
        if self._sizes.lora.rank:
            params = merge(params, self._sizes.lora)
        mine = np.array([max(self._numbers(), default=0) + 1])
        path = self._directory / f"policy-{int(distributed.gather(mine)[0, 0]):06d}"
        tensors = to_tensors(params, self._sizes, jax.numpy.dtype(self._sizes.dtype))
        failure = None
        if distributed.is_main():
            try:
                self._export(path, tensors)
            except OSError as problem:
                failure = problem
        for _ in tensors:  # hosts take the same tensors together, whatever becomes of a file
            pass
        with distributed.together():
            if failure is not None:
                raise failure
        return path

    def forget_old(self) -> None:
        """Removes all but the newest policies."""
        if distributed.is_main():
            for number in sorted(self._numbers())[:-KEPT]:
                shutil.rmtree(self._directory / f"policy-{number:06d}")

    def _export(self, path: Path, tensors: Any) -> None:
        temporary = path.with_suffix(".tmp")
        for left in self._directory.glob("*.tmp"):  # of a run that was killed
            shutil.rmtree(left)
        how = self._tokenizer, self._pixels, self._sizes.dtype
        export_policy(temporary, tensors, self._sizes, *how, system=self._system)
        os.rename(temporary, path)

    def _numbers(self) -> list[int]:
        found = self._directory.iterdir() if self._directory.is_dir() else ()
        return [int(match[1]) for path in found if (match := _NAME.fullmatch(path.name))]
