"""The tables of README.md and docs/, from bench/results: ``python bench tables``."""
