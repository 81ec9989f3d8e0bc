"""Benchmarks: each checks what it measures."""
