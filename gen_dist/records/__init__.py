"""What a run leaves on disk, on the screen and with trackers."""
