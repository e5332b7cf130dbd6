"""The commands that need no Prefect; `flows.cli.app` mounts them beside those that do."""
