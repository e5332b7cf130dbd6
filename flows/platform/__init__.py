"""The platform that the flows run on: server, pools, workers, deployments, submission."""
