"""The commands of `jbn`. Each command has a file with its options and the code that runs it."""
