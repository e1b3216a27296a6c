"""Scheduling: the order of requests, and their batches. Pure."""
