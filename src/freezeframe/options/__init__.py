"""The command line's options as configuration: Cloud Hypervisor's syntax in, `freezeframe.config` records out."""

from __future__ import annotations
