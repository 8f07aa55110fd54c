"""Caches: reuse work between the steps of one sampling run."""
