"""The solvers behind the operators: one folder a backend, and one table to choose from.

A backend trusts its callers; arguments are checked in :mod:`nmsolve.ops`.
"""
