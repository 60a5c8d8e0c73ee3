"""Requests to buckets: what is below an address, small objects, and what goes wrong in words.

The libraries are an extra of this package (`gcs`); nothing of them is loaded before the first
request.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import re
import sys
import uuid
from collections.abc import Iterator
from typing import Any

SCHEME = "gs://"
REACH_SECONDS = 20.0
_FORM = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])((?:/[^/\0\r\n]+)*)/?")


class BucketError(OSError):
    """A bucket that cannot be used; the message has the address and the remedy."""


class Changed(BucketError):
    """What was being read has been written or removed by another meanwhile."""


def is_address(path: str) -> bool:
    """Whether a path names a place in a bucket."""
    return path.startswith(SCHEME)


def check(name: str, address: str) -> None:
    """Raises BucketError for an address that names no folder in a bucket, and where the packages
    that read buckets are missing. Asks nobody.

    Args:
      name: the flag or field that the address is from.
    """
    found = _FORM.fullmatch(address)
    if not found or not found[2] or {".", ".."} & set(found[2].split("/")):
        raise BucketError(f"{name}={address!r}: name a folder in a bucket: gs://BUCKET/PATH")
    missing = [package for package in ("gcsfs", "google.cloud.storage") if not _installed(package)]
    if missing:
        raise BucketError(
            f"{name}={address!r}: what reads buckets is not installed ({', '.join(missing)}): pip "
            "install 'mmrecoder_jax[gcs]', or mount the bucket as a folder and give that (gcsfuse)"
        )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def reach(address: str) -> None:
    """Writes, reads and removes a small object at an address.

    Raises:
      BucketError: one of these cannot be done; within `REACH_SECONDS`.
    """
    path, data = f"{plain(address)}/.probe-{uuid.uuid4().hex[:8]}", uuid.uuid4().bytes
    with talking(address):
        ask("_pipe_file", path, data, seconds=REACH_SECONDS)
        found = ask("_cat_file", path, seconds=REACH_SECONDS)
        ask("_rm_file", path, seconds=REACH_SECONDS)
    if found != data:
        raise BucketError(f"{address}: an object reads otherwise than it was written")


def below(address: str) -> dict[str, dict[str, Any]]:
    """The entries of the objects below an address, by their names below it."""
    root = plain(address) + "/"
    with talking(address):
        found = ask("_find", root, detail=True, update_cache=False, seconds=REACH_SECONDS * 3)
    return {
        path.removeprefix(root): entry
        for path, entry in found.items()
        if path.startswith(root) and not path.endswith("/")
    }


def plain(address: str) -> str:
    """BUCKET/PATH of an address."""
    return address.removeprefix(SCHEME).rstrip("/")


@functools.cache
def _bucket_files() -> Any:
    """The one client; listings are never remembered, since others write too."""
    # Otherwise it asks over gRPC of which kind a bucket is, a minute where nothing answers.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)  # it logs what it raises
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs")


def ask(method: str, *args: Any, seconds: float | None = None, **kwargs: Any) -> Any:
    """Calls a method of the client.

    Args:
      seconds: it may take; None: as long as it takes.
    """
    from fsspec import asyn

    client = _bucket_files()
    return asyn.sync(client.loop, getattr(client, method), *args, timeout=seconds, **kwargs)


def errors() -> tuple[type[Exception], ...]:
    """What the libraries raise about buckets, besides OSError and ValueError."""
    if "gcsfs" not in sys.modules:
        return ()
    import aiohttp
    import google.api_core.exceptions
    import google.auth.exceptions
    import requests.exceptions
    from gcsfs.retry import HttpError

    return (
        *(HttpError, aiohttp.ClientError, requests.exceptions.RequestException),
        *(google.auth.exceptions.GoogleAuthError, google.api_core.exceptions.GoogleAPIError),
    )


@contextlib.contextmanager
def talking(address: str) -> Iterator[None]:
    """Around requests: what goes wrong is a BucketError."""
    try:
        yield
    except BucketError:
        raise
    except Exception as error:
        if text := reason(error):
            kind = Changed if isinstance(error, FileNotFoundError) else BucketError
            raise kind(f"{address}: {text}") from error
        raise


def reason(error: BaseException) -> str:
    """What is wrong with a bucket, and the remedy; "" for an error that is about something else."""
    lines = str(error).split("\n")
    said = f"{type(error).__name__}: {'; '.join(filter(None, lines))[:300]}"
    code = getattr(error, "code", None)
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket, or it lost an object: check the address"
    if str(error).startswith("Forbidden") or code in (401, 403, "401", "403"):
        return (
            f"this account may not do that ({said}): `gcloud auth application-default login`, or "
            "give it roles/storage.objectAdmin of the bucket"
        )
    if isinstance(error, TimeoutError):
        return "the bucket does not answer: check the network"
    if isinstance(error, errors()):
        return f"the bucket cannot be used ({said}): check the network and the account"
    return ""
