"""Hold what all of the driver uses: errors, folders, devices, progress, and the files of a run."""
