"""Control: one closed list of actions on a `Vmm`, with Cloud Hypervisor's states and errors."""
