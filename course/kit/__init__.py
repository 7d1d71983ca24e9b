"""The offline kit: builds, serves and checks one. helpers.models.kit reads it."""
