"""What every other folder may use: errors, whole files, results on disk, extras, servers' errors."""
