"""Test a model for what scores on its corpus do not show; each file says what its test costs, and what it cannot show.

quantisation: weights rounded to int8, int4 or NF4
"""

__all__ = ["quantisation"]
