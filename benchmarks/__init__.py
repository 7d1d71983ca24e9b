"""Measurements of the pages and of the chat model, for the README."""
