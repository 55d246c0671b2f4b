"""What terminals show: progress bars, the monitor screen, sparklines, and numbers with units."""
