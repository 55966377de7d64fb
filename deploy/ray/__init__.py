"""Ray Serve: the same application on every replica, routed by prefix and size, scaled on degradation."""
