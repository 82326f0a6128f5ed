"""The real thing: methods on processes and sockets, in the user's own training loop."""
