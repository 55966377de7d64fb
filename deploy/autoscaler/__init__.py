"""Scales replicas on degradation: how far below their ceiling requests are being served, not how busy a processor is.

`decision` is pure (the simulator drives it too), `signals` reads Prometheus, `drivers` start and drain replicas,
`controller` is the loop that joins them. Run as `python -m deploy.autoscaler`.
"""
