"""Processes: starting them, stopping their whole tree, hearing a request to stop."""
