//! Virtio devices: transport, queues, data paths.
