"""What is run now and then for the project itself: each is a command, `python -m tools.NAME`."""
