"""What every command needs of the machine: processes, devices, signals, files, resumable jobs."""
