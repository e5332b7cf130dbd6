"""The producer's side: prompts, leases, targets, capture workers and the drive loop."""
