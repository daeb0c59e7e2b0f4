"""Typed run configuration: the tree, loading, validation, the model's shape and the planner. Imports no torch."""
