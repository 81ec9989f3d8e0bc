"""Reports: what run directories hold, as pages, tables and pictures for people."""
