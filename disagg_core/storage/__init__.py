"""Files kept for good: a directory or any prefix that fsspec knows, and whole trees of files in it."""
