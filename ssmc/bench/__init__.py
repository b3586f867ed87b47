"""Latency and memory of models: time to the first token, per token, to the last token."""
