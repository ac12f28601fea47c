"""Several processes: placement, sharding, offloading, DeepSpeed, errors."""
