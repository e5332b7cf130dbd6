"""Metrics, progress and plots, as plain files."""
