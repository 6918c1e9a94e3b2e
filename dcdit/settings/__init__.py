"""What commands share: composing and checking a configuration, help, how errors are told."""
