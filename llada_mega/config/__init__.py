"""Typed configuration: the schema, composing it, checking it, and what follows from it."""
