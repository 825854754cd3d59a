"""What is tried, where, and in which order: configuration, hardware, ranges, studies, the run and its command line."""
