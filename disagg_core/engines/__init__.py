"""Engines that run the frozen target and capture its hidden states."""
