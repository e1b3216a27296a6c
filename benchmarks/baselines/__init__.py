"""Baselines for zsl: the same job with plain ZeroMQ and gRPC. Not part of zsl."""
