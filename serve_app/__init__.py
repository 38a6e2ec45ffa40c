"""Ivysaur behind an OpenAI-compatible API, on Ray Serve."""
