"""What `jbn bench` runs: cases, peers, times, counts of the compiled programs, and the report."""
