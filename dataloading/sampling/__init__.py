"""What is trained on and when: in go seed, epoch and position, out come samples, clip starts and crops."""
