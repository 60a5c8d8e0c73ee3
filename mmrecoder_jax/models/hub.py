"""Names of the Hugging Face hub -> directories on this machine."""

import functools
import os
import re

from mmrecoder_jax.models.files import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
# Where the hub's library keeps a model: .../models--Qwen--Qwen2.5-VL-7B-Instruct/snapshots/<commit>
_KEPT = re.compile(r"models--(.+?)--(.+)")


def is_hub_id(name: str) -> bool:
    """Whether a name that is no directory can be one of the hub: `Qwen/Qwen2.5-VL-7B-Instruct`.

    `runs/stage2` cannot where there is a folder `runs`: then the name is a mistyped path.
    """
    return bool(_HUB_ID.fullmatch(name)) and not os.path.isdir(name.split("/")[0])


def local_directory(name: str) -> str:
    """The directory of a model that is named by a directory or by its id of the hub.

    A model of the hub is downloaded once, with a bar, and is then found where the hub's library
    keeps it.

    Raises:
      CheckpointError: an id that the hub does not have, or that cannot be reached.
    """
    return _snapshot(name) if not os.path.exists(name) and is_hub_id(name) else name


@functools.cache
def _snapshot(name: str) -> str:
    # imported here: it takes a second, and most runs begin with a directory
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{name!r} is no directory here, and the hub did not give a model of this name "
            f"({type(error).__name__}: {reason}): check the name and the network, run `hf auth "
            f"login` where the model is gated, or where there is no network download it elsewhere "
            f"(`hf download {name} --local-dir {os.path.basename(name)}`), copy that directory "
            "here and give it"
        ) from error


def published_name(directory: str) -> str:
    """The name by which others know a model: its id where the hub's library keeps it, else the
    directory as it is given.
    """
    for part in os.path.normpath(directory).split(os.sep):
        if kept := _KEPT.fullmatch(part):
            return f"{kept[1]}/{kept[2]}"
    return directory
