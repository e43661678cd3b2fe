"""The tasks of the scoreboard, one per file."""
