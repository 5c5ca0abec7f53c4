"""Client of the REST socket; `ch-remote` and tests use it. It talks to Cloud Hypervisor's own server just as well."""

from __future__ import annotations

from freezeframe.client.connection import Connection, Response

__all__ = ["Connection", "Response"]
