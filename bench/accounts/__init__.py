"""The processes that `python -m bench shared` starts. Each prints `ready`, begins at a line, and prints what it did."""
