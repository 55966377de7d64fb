"""Running boomerang-serve beyond one process: load balancer, monitoring, autoscaler, clusters."""
