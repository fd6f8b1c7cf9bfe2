"""The order of samples, without a list of samples: a seeded permutation of [0, n) computed where it is asked.

A Feistel network permutes the numbers of b bits, 2**(b-1) < n <= 2**b; an image outside [0, n) is sent through again until
it lies inside ("cycle walking", fewer than two rounds on average), which permutes [0, n) itself. Nothing is stored, whatever n.
"""

import hashlib

import numpy as np

ROUNDS = 6


def round_keys(*seed: int | str) -> np.ndarray:
    """Keys of the network from anything that names an order, for example (seed, fingerprint, epoch)."""
    digest = hashlib.blake2b("/".join(map(str, seed)).encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where the permutation of [0, size) that `keys` name sends each index (int64 in, int64 out, any shape)."""
    assert size > 0
    flat = np.asarray(index, dtype=np.int64).ravel()
    assert flat.size == 0 or (flat.min() >= 0 and flat.max() < size)
    if size == 1:
        return np.zeros_like(index)
    bits = (size - 1).bit_length()
    value = _network(flat.astype(np.uint64), bits, keys)
    while (outside := np.flatnonzero(value >= size)).size:
        value[outside] = _network(value[outside], bits, keys)
    return value.astype(np.int64).reshape(np.shape(index))


def _network(value: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """One pass: the halves (of unequal width when bits is odd) take turns at being mixed into each other."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    high, low = value >> low_bits, value & low_mask
    for turn, key in enumerate(keys):
        if turn % 2:
            low = low ^ (_mix(high ^ key) & low_mask)
        else:
            high = high ^ (_mix(low ^ key) & high_mask)
    return (high << low_bits) | low


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finisher: every input bit changes every output bit with probability near one half."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
