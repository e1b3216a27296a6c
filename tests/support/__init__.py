"""Helpers of the tests: tiny models, real daemons, comparisons."""
