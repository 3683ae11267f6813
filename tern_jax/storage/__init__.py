"""Ternary weights in memory and on disk, packed."""
