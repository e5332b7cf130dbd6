"""What any engine behind HTTP needs: processes, a pool with circuit breakers, the capture's wire format."""
