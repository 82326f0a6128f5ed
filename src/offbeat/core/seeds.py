"""Seeds that depend on who and when, and on nothing else."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def derive(*parts: int) -> int:
    """A 63-bit seed that is a pure function of ``parts`` (any integers), for example ``derive(seed, worker, step)``.

    Each part is folded in with the finaliser of SplitMix64 (Steele, Lea, Flood 2014), so that neighbouring workers
    and steps get unrelated seeds, in every process and on every machine alike.
    """
    state = 0
    for part in parts:
        state = (state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1
