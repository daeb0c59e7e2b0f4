"""Checkpoint tools: convert, verify and inspect, one tensor at a time (console script megalong-convert)."""
