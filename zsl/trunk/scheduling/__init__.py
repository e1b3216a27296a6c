"""The order of requests and which of them share a pass. Pure."""
