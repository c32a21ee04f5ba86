"""Make random bits that depend on a key alone: alike on all ranks, and after a resume."""

import hashlib


def random_bits(*key: object) -> int:
    """Return 64 bits, from the repr of the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
