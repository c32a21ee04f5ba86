"""Hypothesis, with the same examples in every process: tests that use it import this.

derandomize=True alone does not make them so. One value in twenty comes from the constants of all
modules of the repository that are imported by then: train, say, if one of its tests ran before in
the same worker. No setting leaves them out. tests/test_ops_random.py notices if Hypothesis finds
another way to them.
"""

from hypothesis.internal.conjecture import providers

assert callable(providers._get_local_constants)
providers._get_local_constants = providers.Constants
