"""Kernels as pure functions on arrays. This package imports jax only, nothing of olmax."""
