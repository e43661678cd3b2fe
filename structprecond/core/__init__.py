"""The optimizer core: units, buckets and the step loop."""
