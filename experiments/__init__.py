"""Experiments with tern_jax: one file is one claim."""
