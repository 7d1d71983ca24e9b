"""Measures the pages, the chat model, the service and the batch, for the tables of the documents."""
