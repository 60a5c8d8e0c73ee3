"""Texts that are too long for a record."""

import hashlib

_LONGEST = 1000  # characters; `records` takes some more


def shortened(text: str) -> str:
    """The text, or its start and a hash of all of it: equal only where the texts are."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]} {hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()}"
