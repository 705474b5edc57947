"""TARGETS: kinds of processors, as far as they compute eight-bit products in different ways. No torch here."""

import platform
import warnings
from dataclasses import dataclass

from restnet_hf.runtime.processor import cpuinfo


AUTO = "auto"
DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8"}  # flags of Linux for instructions that sum in 32 bits


@dataclass(frozen=True)
class Target:
    """One row of `TARGETS`.

    Args:
        full_range: whether weights can have all eight bits. Without dot products of 32 bits (VNNI), x86 adds two
            products in 16 bits, which saturate, unless weights have seven bits.
        means: what the processors of this kind have in common.
    """

    full_range: bool
    means: str


TARGETS: dict[str, Target] = {
    "x86-avx2": Target(False, "x86 without VNNI"),
    "x86-vnni": Target(True, "x86 with AVX-VNNI, AVX-512 VNNI or AMX"),
    "arm": Target(True, "64-bit Arm"),
}
"""Kinds of processors to quantise for, by name."""


def this_target() -> str:
    """The kind of this processor, a key of `TARGETS`.

    An x86 processor whose instructions the system does not list counts as ``x86-avx2``, on which any file runs well.
    """
    if platform.machine().lower() in ("arm64", "aarch64", "armv8l"):
        return "arm"
    flags = {flag for each in cpuinfo("flags") for flag in each.split()}
    return "x86-vnni" if flags & DOT_PRODUCTS else "x86-avx2"


def resolve_target(target: str) -> str:
    """The key of `TARGETS` that a name stands for; ``auto`` is this processor's.

    Raises:
        ValueError: there is no such kind.
    """
    if target == AUTO:
        return this_target()
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is not one of {[AUTO, *TARGETS]}")
    return target


def warn_of_saturation(target: object) -> None:
    """Warn where weights of the full range would run on a processor whose sums saturate, as accuracy can fall there.

    Args:
        target: kind of processor that a folder was quantised for; None where it was not.
    """
    here = this_target()
    if isinstance(target, str) and target in TARGETS and TARGETS[target].full_range and not TARGETS[here].full_range:
        warnings.warn(
            f"this folder was quantised for {target}, and this processor is {here} ({TARGETS[here].means}), whose "
            f"eight-bit sums can overflow: answers may be worse than at the export; export it with target='{here}'",
            UserWarning,
            stacklevel=2,
        )
