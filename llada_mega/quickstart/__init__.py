"""The whole story on one machine with no configuration; ``story.py`` tells it in order."""
