"""The command `python -m tern_jax`: what it reads, and what it says of it."""
