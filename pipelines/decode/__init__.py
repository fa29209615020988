"""Backends that turn stored bytes into pixels: the reference, DALI on a CPU, DALI on a GPU."""
