"""From files of any place and format to raw rows."""
