"""Measure: exact MACs, fair time ratios, distances between pictures and feature sets."""

from __future__ import annotations

from . import macs, metrics, timing
from .macs import attention_macs, count_macs, macs_by_module
from .metrics import frechet_distance, mean_psnr, psnr, relative_error, ssim
from .timing import PairedTiming, paired_ratio


__all__ = [
    "PairedTiming",
    "attention_macs",
    "count_macs",
    "frechet_distance",
    "macs",
    "macs_by_module",
    "mean_psnr",
    "metrics",
    "paired_ratio",
    "psnr",
    "relative_error",
    "ssim",
    "timing",
]
