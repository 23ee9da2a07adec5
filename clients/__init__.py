"""Clients of the server: `client` for Python, `paint` for the command line, ``curl.sh`` for everything else.

Nothing here imports the server: the folder may be copied anywhere.
"""
