"""REST on a unix socket: HTTP/1.1 in, `control` actions, HTTP out."""
