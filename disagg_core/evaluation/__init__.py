"""Speculative decoding with a draft and its accept length."""
