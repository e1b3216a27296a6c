"""Resolve, identify, load, quantize and divide models."""
