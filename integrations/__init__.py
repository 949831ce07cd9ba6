"""One flat module for each neighbour of fdshare; imported as ``fdshare.integrations``, never as ``integrations``.

Each module imports its library only when it is used, and uses only fdshare's public names.
"""
