"""What is on disk, and how a teacher and a student interlock. Imports nothing from the server."""
