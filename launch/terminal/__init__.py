"""Terminal output: progress line, monitor screen, sparklines, and numbers with units."""
