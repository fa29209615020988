"""Sample keys: short ASCII names that every WebDataset reader splits alike."""

import re
import unicodedata

import xxhash

_LONGEST_SLUG = 60


def sample_key(sample_id: str) -> str:
    """``<slug>-<xxh3-64 of the id>``: readable, at most 77 of ``[a-z0-9_-]``, one for one with the id.

    Dots would split the key, spaces and other alphabets break some readers; the original name stays in the JSON.
    """
    plain = unicodedata.normalize("NFKD", sample_id).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9_]+", "-", plain).strip("-")[:_LONGEST_SLUG].strip("-")
    digest = xxhash.xxh3_64_hexdigest(sample_id.encode("utf-8", "surrogateescape"))
    return f"{slug or 'sample'}-{digest}"
