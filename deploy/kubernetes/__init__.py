"""Kubernetes manifests (kustomize)."""
