"""The data plane: frames, connections, the server's sockets, shared memory."""
