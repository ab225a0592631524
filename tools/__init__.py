"""What makes the pictures of the project from the real page. Each is a command, `python -m tools.NAME`."""
