"""What the subcommands of ``fdshare`` do; each loads when it is first used."""
