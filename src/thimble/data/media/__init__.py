"""Pictures and sound: found in folders and manifests, checked, split, and decoded into arrays."""
