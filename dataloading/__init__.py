"""From raw videos to shards, and from shards to tubelets on the device."""
