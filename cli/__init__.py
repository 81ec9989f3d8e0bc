"""The command line: click commands over the library."""
