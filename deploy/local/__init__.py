"""The components of docker-compose.yml as processes of this machine: for trying them without Docker, and for tests."""
