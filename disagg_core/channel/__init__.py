"""The reference channel: a tensor-free, ordered stream of sample references between two processes."""
