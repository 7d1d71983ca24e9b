"""What a page shows: tables, signatures, tokens, figures, a playground, a server's figures, drift.

HTML for a notebook has a twin in text for a terminal.
"""
