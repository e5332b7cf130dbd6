"""The commands that need no Prefect; `flows.cli` mounts them beside those that do."""
