"""The channel in Redis Streams, for pools without a shared mount."""
