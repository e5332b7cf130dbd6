"""The Prefect flows, the local platform they run on, and the command line: read top to bottom, they are the product."""
