"""The measurements of `jbn bench`: cases, libraries, times, counts of compiled programs, and the report."""
