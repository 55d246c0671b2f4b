"""The `mcl` command: one thin module for each subcommand, which parses arguments, calls the library and prints."""
