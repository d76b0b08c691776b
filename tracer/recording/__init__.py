"""Hooks on a model and what becomes of its calls."""
