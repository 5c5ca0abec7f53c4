"""The console scripts `cloud-hypervisor`, `ch-remote` and `freezeframe`."""
