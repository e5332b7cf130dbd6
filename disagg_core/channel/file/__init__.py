"""The channel in a directory on a shared mount: log, claims, cursor, and the watch for changes."""
