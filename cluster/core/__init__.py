"""The parameter server and the worker: plain Python, without sockets, files or Ray."""
