"""The offline kit: build one, offer it to a room, check it. Reading one is helpers.models.kit."""
